from __future__ import annotations

import os
import random

from models.unique import unique


def test_they_are_as_long_as_asked_for_and_different() -> None:
    assert {len(unique(24)) for _ in range(500)} == {24}
    assert len({unique() for _ in range(10_000)}) == 10_000


def test_a_seed_of_others_changes_nothing() -> None:
    random.seed(1)
    first = unique()
    random.seed(1)
    assert unique() != first


def test_a_forked_process_draws_others() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, unique().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100).decode() != unique()
