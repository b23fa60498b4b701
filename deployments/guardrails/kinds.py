"""The words that the configuration and the rules share."""

from __future__ import annotations

from enum import StrEnum


class Action(StrEnum):
    ALLOW = "allow"
    MASK = "mask"
    """Write the category in its place: ``[EMAIL]``."""
    REFUSE = "refuse"
    """Answer 400; or end a stream that has begun with the error."""


class PiiKind(StrEnum):
    EMAIL = "email"
    CARD = "card"
    IBAN = "iban"
    NATIONAL_ID = "national_id"
    IP = "ip"
    PHONE = "phone"


class Done(StrEnum):
    """What came of a text that a guardrail objected to."""

    MASKED = "masked"
    REFUSED = "refused"
    REROUTED = "rerouted"
    """Another model answers it."""
    UNAVAILABLE = "unavailable"
    """Nobody could look at it, and it was not let through."""
    UNCHECKED = "unchecked"
    """Nobody could look at it, and it was let through."""


class Way(StrEnum):
    INPUT = "input"
    OUTPUT = "output"
