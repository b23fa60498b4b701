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
