"""Checks of what goes in. A check is a value in a list; ``guard.py`` makes the list.

One that asks a model belongs here too: that is why checks are awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.guardrails.rules import Rule
from deployments.guardrails.screen import Masker, Screen
from models.errors import InvalidInput

OFF_LOOP = 20_000
"""Characters from which on the event loop is spared the work: it takes milliseconds then."""


class InputCheck(Protocol):
    async def __call__(self, texts: Sequence[str], /) -> Sequence[str]:
        """The texts of one prompt (the messages of a conversation) as the model may see them.

        Raises:
            InvalidInput: the model may not see them. ``details`` has ``guardrail`` and
                ``category``, and nothing of the text.
        """
        ...


@dataclass(frozen=True, slots=True)
class Length:
    """Of all texts together."""

    max_chars: int

    async def __call__(self, texts: Sequence[str], /) -> Sequence[str]:
        length = sum(map(len, texts))
        if length > self.max_chars:
            raise InvalidInput(
                f"The prompt has {length} characters; {self.max_chars} are allowed. Shorten it.",
                details={
                    "guardrail": "prompt_length",
                    "category": "characters",
                    "length": length,
                    "allowed": self.max_chars,
                },
            )
        return texts


@dataclass(frozen=True, slots=True)
class Screening:
    """Blocked categories and personal data."""

    screen: Screen

    async def __call__(self, texts: Sequence[str], /) -> Sequence[str]:
        if sum(map(len, texts)) > OFF_LOOP:
            return await asyncio.to_thread(self._screened, texts)
        return self._screened(texts)

    def _screened(self, texts: Sequence[str]) -> Sequence[str]:
        shown = []
        for text in texts:
            masker = Masker(self.screen)
            shown.append(masker.push(text, last=True))
            if masker.refused is not None:
                raise refusal(masker.refused, "The prompt was refused")
        return shown


def refusal(rule: Rule, what: str) -> InvalidInput:
    """It says which rule, never what was found."""
    return InvalidInput(
        f"{what}: the guardrail {rule.guardrail!r} found the category {rule.category!r}.",
        details={"guardrail": rule.guardrail, "category": rule.category},
    )
