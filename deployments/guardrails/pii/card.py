"""Payment cards: the issuers' first digits and lengths, and the check digit of ISO/IEC 7812."""

from __future__ import annotations

import re

from deployments.guardrails.kinds import PiiKind
from deployments.guardrails.pii.rule import WORD, digits, rule

ISSUERS = re.compile(
    r"4(\d{12}|\d{15}|\d{18})"  # Visa
    r"|(5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(6011|64[4-9]\d|65\d\d|62\d\d)\d{12,15}"  # Discover, UnionPay
    r"|3(0[0-5]|[689]\d)\d{11}"  # Diners Club
    r"|35\d{14}|(2131|1800)\d{11}"  # JCB
    r"|(0604|50\d\d|5[6-8]\d\d|6304|6390|67\d\d)\d{8,15}"  # Maestro
)


def card(text: str) -> int:
    number = digits(text)
    return len(text) if ISSUERS.fullmatch(number) and luhn(number) else 0


def luhn(number: str) -> bool:
    """Every second digit from the right is doubled, and its own digits are added up."""
    total = 0
    for index, digit in enumerate(reversed(number)):
        value = int(digit) << (index & 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


RULES = (
    rule(
        PiiKind.CARD,
        r"\d{12,19}",
        r"\d{4}(?: \d{4}){2,3}(?: \d{1,3})?",
        r"\d{4}(?:-\d{4}){2,3}(?:-\d{1,3})?",
        r"\d{4}[ -]\d{6}[ -]\d{4,5}",
        before=WORD + ".",  # not the places of a decimal fraction
        fit=card,
    ),
)
