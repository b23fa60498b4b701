"""Checks of what goes in. A check is a value in a list; ``guard.py`` makes the list.

One that asks a model belongs here too: that is why checks are awaited.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.guardrails.kinds import Done, Way
from deployments.guardrails.rules import Rule
from deployments.guardrails.screen import Masker, Screen
from deployments.observability.events import Emit, GuardrailActed, discard
from models.contracts import Priority
from models.errors import InvalidInput

OFF_LOOP = 20_000
"""Characters from which on the event loop is spared the work: it takes milliseconds then."""


@dataclass(slots=True, kw_only=True)
class Inquiry:
    """One request as its checks know it: they read who asks, and write down what they decide."""

    tenant: str = "public"
    priority: Priority = Priority.STANDARD
    emit: Emit = discard
    reroute_to: str | None = None
    """The model that shall answer in place of the one that was asked."""

    def tell(self, guardrail: str, category: str, done: Done, way: Way, times: int = 1) -> None:
        self.emit(
            GuardrailActed(
                guardrail=guardrail,
                category=category,
                done=done,
                way=way,
                tenant=self.tenant,
                times=times,
            )
        )

    def tell_masked(self, rules: Iterable[Rule], way: Way) -> None:
        found = Counter((rule.guardrail, rule.category) for rule in rules)
        for (guardrail, category), times in found.items():
            self.tell(guardrail, category, Done.MASKED, way, times)

    def tell_refused(self, error: InvalidInput, way: Way = Way.INPUT) -> None:
        guardrail, category = error.details["guardrail"], error.details["category"]
        self.tell(str(guardrail), str(category), Done.REFUSED, way)


class InputCheck(Protocol):
    async def __call__(self, texts: Sequence[str], inquiry: Inquiry, /) -> Sequence[str]:
        """The texts of one prompt (the messages of a conversation) as the model may see them.

        Raises:
            InvalidInput: the model may not see them. ``details`` has ``guardrail`` and
                ``category``, and nothing of the text.
            Unavailable: nobody can tell now.
        """
        ...


@dataclass(frozen=True, slots=True)
class Length:
    """Of all texts together."""

    max_chars: int

    async def __call__(self, texts: Sequence[str], inquiry: Inquiry, /) -> Sequence[str]:
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

    async def __call__(self, texts: Sequence[str], inquiry: Inquiry, /) -> Sequence[str]:
        if sum(map(len, texts)) > OFF_LOOP:
            shown, masked = await asyncio.to_thread(self._screened, texts)
        else:
            shown, masked = self._screened(texts)
        inquiry.tell_masked(masked, Way.INPUT)
        return shown

    def _screened(self, texts: Sequence[str]) -> tuple[Sequence[str], Sequence[Rule]]:
        shown: list[str] = []
        masked: list[Rule] = []
        for text in texts:
            masker = Masker(self.screen)
            shown.append(masker.push(text, last=True))
            masked += masker.masked
            if masker.refused is not None:
                raise refusal(masker.refused, "The prompt was refused")
        return shown, masked


def refusal(rule: Rule, what: str) -> InvalidInput:
    """It says which rule, never what was found."""
    return InvalidInput(
        f"{what}: the guardrail {rule.guardrail!r} found the category {rule.category!r}.",
        details={"guardrail": rule.guardrail, "category": rule.category},
    )
