"""The check of a prompt: vectors of its pieces, and the worst of their scores.

It asks the encoder that everybody asks, and waits in its queue like everybody: one that sends
much waits behind itself. What it has judged once it remembers for a while, since conversations
come again with every turn, and system messages with every request.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

from deployments.config import SafetyConfig
from deployments.guardrails.checks import Inquiry
from deployments.guardrails.kinds import Done, Way
from deployments.guardrails.safety.head import Head
from deployments.guardrails.safety.pieces import pieces
from models.contracts import Standing
from models.errors import InvalidInput, PlatformError, Unavailable

if TYPE_CHECKING:  # the gateway's services make the guardrails
    from deployments.gateway.services import Embedder

logger = logging.getLogger(__name__)

GUARDRAIL, CATEGORY = "safety", "unsafe"
REMEMBERED = 20_000
"""Pieces whose scores are kept, some 3 MB."""


class Scores:
    """Of pieces seen lately. A tenant's are its own: what others wrote cannot be probed for."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._scores: OrderedDict[bytes, float] = OrderedDict()

    def key(self, tenant: str, piece: str) -> bytes:
        return blake2b(f"{tenant}\0{piece}".encode(), digest_size=16).digest()

    def get(self, key: bytes) -> float | None:
        if key in self._scores:
            self._scores.move_to_end(key)
        return self._scores.get(key)

    def put(self, key: bytes, score: float) -> None:
        self._scores[key] = score
        if len(self._scores) > self._most:
            self._scores.popitem(last=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Safety:
    """An ``InputCheck``. It comes last, and sees personal data masked."""

    config: SafetyConfig
    head: Head
    embedder: Callable[[str], Embedder]
    """By the name of its model."""
    scores: Scores = field(default_factory=Scores)

    async def __call__(self, texts: Sequence[str], inquiry: Inquiry, /) -> Sequence[str]:
        length, most = sum(map(len, texts)), self.config.max_chars
        if length > most:  # it cannot be looked at whole, and in the rest anything could hide
            raise InvalidInput(
                f"The prompt has {length} characters; the safety check reads {most}. Shorten it.",
                details={"guardrail": GUARDRAIL, "category": "length", "allowed": most},
            )
        try:
            async with asyncio.timeout(self.config.patience_s):
                worst = await self._worst(texts, inquiry)
        except (PlatformError, TimeoutError) as error:
            logger.warning("a prompt could not be checked for safety: %r", error)
            if self.config.on_failure == "allow":
                inquiry.tell(GUARDRAIL, CATEGORY, Done.UNCHECKED, Way.INPUT)
                return texts
            inquiry.tell(GUARDRAIL, CATEGORY, Done.UNAVAILABLE, Way.INPUT)
            raise Unavailable(
                "The safety check of the prompt does not answer; nothing was done. Try again.",
                details={"guardrail": GUARDRAIL},
                retry_after=1,
            ) from error
        if worst >= (self.config.threshold or self.head.threshold):
            self._hit(inquiry)
        return texts

    def _hit(self, inquiry: Inquiry) -> None:
        """Raises InvalidInput, without the score: it would tell how to get below the threshold."""
        if self.config.reroute_to is None:
            raise InvalidInput(
                f"The prompt was refused: the guardrail {GUARDRAIL!r} found the category"
                f" {CATEGORY!r}.",
                details={"guardrail": GUARDRAIL, "category": CATEGORY},
            )
        inquiry.reroute_to = self.config.reroute_to
        inquiry.tell(GUARDRAIL, CATEGORY, Done.REROUTED, Way.INPUT)

    async def _worst(self, texts: Sequence[str], inquiry: Inquiry) -> float:
        worst, unknown = 0.0, dict[bytes, str]()
        for text in texts:
            for piece in pieces(text.encode("utf-8", "replace").decode()):
                key = self.scores.key(inquiry.tenant, piece)
                known = self.scores.get(key)
                if known is None:
                    unknown[key] = piece
                else:
                    worst = max(worst, known)
        if unknown:
            result = await self.embedder(self.config.model).embed(
                list(unknown.values()),
                Standing(
                    tenant=inquiry.tenant,
                    priority=inquiry.priority,
                    timeout_s=self.config.patience_s,
                ),
            )
            for key, score in zip(unknown, self.head.scores(result.vectors).tolist(), strict=True):
                self.scores.put(key, score)
                worst = max(worst, score)
        return worst
