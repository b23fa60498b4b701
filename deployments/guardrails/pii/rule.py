"""What the rules about personal data have in common."""

from __future__ import annotations

from collections.abc import Callable

from deployments.guardrails.kinds import PiiKind
from deployments.guardrails.patterns import read
from deployments.guardrails.rules import Rule

WORD = "0-9A-Za-z_"


def rule(
    kind: PiiKind,
    *alternatives: str,
    before: str = WORD,
    after: str = WORD,
    fit: Callable[[str], int] = len,
) -> Rule:
    return Rule(
        guardrail="pii",
        category=kind.value,
        pattern=read("|".join(alternatives)),
        before=before,
        after=after,
        fit=fit,
    )


def digits(text: str) -> str:
    return "".join([character for character in text if character.isdigit()])
