"""Hands on the engine's forward passes: hold them, fail them, spoil them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import torch

from deployments.engines.engine import Engine

POISON = 299
"""A token of which a poisoned model makes NaN."""


class Gate:
    """Holds each forward pass at its beginning until it is let through."""

    def __init__(self, engine: Engine) -> None:
        self._entered = threading.Semaphore(0)
        self._allowed = threading.Semaphore(0)
        self._open = False
        engine._runner.model.get_input_embeddings().register_forward_pre_hook(self._hold)

    def _hold(self, *_: Any) -> None:
        if not self._open:
            self._entered.release()
            assert self._allowed.acquire(timeout=30)

    async def entered(self) -> None:
        """Wait until a pass begins; it is held."""
        assert await asyncio.to_thread(self._entered.acquire, timeout=30)

    async def steps(self, count: int = 1) -> None:
        """Let passes through, and wait until the next is held."""
        for _ in range(count):
            self._allowed.release()
            await self.entered()

    def open(self) -> None:
        """Hold nothing any more."""
        self._open = True
        self._allowed.release()


class Failure:
    """Makes the forward pass raise, behind its last layer, while ``on``."""

    def __init__(self, engine: Engine) -> None:
        self.on = False
        engine._runner.model.lm_head.register_forward_pre_hook(self._raise)

    def _raise(self, *_: Any) -> None:
        if self.on:
            raise RuntimeError("the device is on fire")


class Poison:
    """Makes the model compute NaN from ``POISON``, or while ``everywhere`` from any token."""

    def __init__(self, engine: Engine) -> None:
        self.everywhere = False
        engine._runner.model.get_input_embeddings().register_forward_hook(self._spoil)

    def _spoil(self, _: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        bad = (inputs[0] == POISON) | self.everywhere
        return out.masked_fill(bad[..., None], torch.nan)
