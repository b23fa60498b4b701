"""One thread that computes, and everything it is asked to."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from deployments.config import EngineConfig, QueueConfig
from deployments.engines.computing import Computing
from deployments.engines.engine import Engine
from models.errors import ConfigError


def alive() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_calls_and_the_loop_share_a_thread_with_its_own_number_of_threads() -> None:
    before = torch.get_num_threads()
    computing = Computing(before + 1, name="computing-test")
    seen = [computing.call(threading.get_ident), computing.call(threading.get_ident)]
    assert computing.call(torch.get_num_threads) == before + 1
    done = threading.Event()

    def loop() -> None:
        seen.append(threading.get_ident())
        done.set()

    computing.run(loop)
    assert done.wait(10)
    computing.join()
    assert not computing.alive
    assert len(set(seen)) == 1
    assert seen[0] != threading.get_ident()
    torch.set_num_threads(before)


def test_what_a_call_raises_is_raised_here_and_ends_the_thread() -> None:
    computing = Computing(None, name="computing-failing")

    def fail() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        computing.call(fail)
    computing.join()
    assert "computing-failing" not in alive()


def test_an_engine_that_cannot_load_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError):
        Engine("nothing", tmp_path, EngineConfig(), QueueConfig())
    assert "engine-nothing" not in alive()
