"""The one thread that computes, from loading the model on.

Every thread that asks torch for a parallel computation gets helper threads of its own, and
keeps them. OpenMP lets helpers spin between two computations, which takes microseconds, only
while there are no more of them in the process than processors; beyond that they sleep, and each
of the thousand computations of a step waits for the kernel to wake them (measured: a step of 32
sequences took a fifth longer, one with adapters two thirds). So nobody else computes: the model
is loaded, checked and packed in the very thread that will run it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


class Computing:
    """A daemon thread.

    Args:
        threads: of torch, in this thread; default: torch's own choice.
    """

    def __init__(self, threads: int | None, *, name: str) -> None:
        self._threads = threads
        self._jobs: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def call(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or raises, there. If it raises, the thread ends."""
        future: Future[T] = Future()

        def job() -> bool:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
                return False
            return True

        self._jobs.put(job)
        return future.result()

    def run(self, loop: Callable[[], None]) -> None:
        """Run ``loop`` there, without waiting for it. The thread ends with it."""

        def job() -> bool:
            loop()
            return False

        self._jobs.put(job)

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # of this thread: OpenMP keeps one number for each
        while self._jobs.get()():
            pass
