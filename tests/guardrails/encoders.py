"""An encoder in place of MiniLM: what it thinks of a text is a word in the text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deployments.gateway.services import EmbedResult
from deployments.guardrails.safety.head import Head
from models.contracts import Priority, Standing

HEAD = Head.load()
ALARM = "bomb"


def vector(score: float) -> NDArray[np.float32]:
    """One that the classifier gives this score."""
    logit = np.log(score / (1 - score)) - HEAD.intercept
    found = logit * HEAD.weights / (HEAD.weights @ HEAD.weights)
    return np.asarray(found, dtype=np.float32)


@dataclass
class AlarmedEmbedder:
    error: Exception | None = None
    delay_s: float = 0.0
    width: int = HEAD.dimensions
    alarm: float = 0.999
    """What it makes of a text with that word in it."""
    calls: list[tuple[list[str], Priority, str]] = field(default_factory=list)

    async def embed(self, inputs: Sequence[str], standing: Standing) -> EmbedResult:
        self.calls.append((list(inputs), standing.priority, standing.tenant))
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        scores = [self.alarm if ALARM in text else 0.001 for text in inputs]
        return EmbedResult(
            vectors=[vector(score)[: self.width] for score in scores],
            tokens=[1] * len(inputs),
        )

    @property
    def texts(self) -> list[str]:
        return [text for texts, *_ in self.calls for text in texts]
