"""Personal data: one file a kind, each a few rules that need no model.

A find that has check digits is checked, so that a number which only looks like a card is
left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from deployments.guardrails.kinds import PiiKind
from deployments.guardrails.pii import card, email, iban, ip, national_id, phone
from deployments.guardrails.rules import Rule

RULES: Mapping[PiiKind, tuple[Rule, ...]] = {
    PiiKind.EMAIL: email.RULES,
    PiiKind.CARD: card.RULES,
    PiiKind.IBAN: iban.RULES,
    PiiKind.NATIONAL_ID: national_id.RULES,
    PiiKind.IP: ip.RULES,
    PiiKind.PHONE: phone.RULES,
}
"""The surest first: where two fit alike, the first one names it."""
