"""Journals that are closed when the test is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tune.journal import Journal

Open = Callable[..., Journal]


@pytest.fixture
def journal() -> Iterator[Open]:
    """``journal(folder)``, as often as a test likes."""
    with ExitStack() as stack:

        def open_one(folder: Path, clock: Callable[[], float] = time.monotonic) -> Journal:
            return stack.enter_context(closing(Journal(folder, clock)))

        yield open_one
