"""Telephone numbers: international ones, those that begin with a 0, and North American ones.

A number says nothing of itself that could be checked. So only forms count that little else
has, and what reads like a date is left alone.
"""

from __future__ import annotations

import re

from deployments.guardrails.kinds import PiiKind
from deployments.guardrails.pii.rule import WORD, digits, rule

EXTENSION = r"(?: ?(?:x|ext\.?) ?\d{1,5})?"
DATE = re.compile(r"\d\d([ /.-])\d\d\1(?:19|20)\d\d(?!\d)")
DIGITS = range(9, 13)
"""Of a number that begins with a 0; shorter ones are too much like others."""
BEFORE = WORD + r".,+/#$€£\-"


def trunk(text: str) -> int:
    """What follows after a blank may be another number: it is left out if there is too much."""
    while text:
        if len(digits(text)) in DIGITS and not DATE.match(text):
            return len(text)
        text = text.rpartition(" ")[0].rstrip(" /-")
    return 0


RULES = (
    rule(
        PiiKind.PHONE,
        rf"(?:\+|00)[1-9](?:[ ()./-]{{0,3}}\d){{7,14}}{EXTENSION}",
        before=BEFORE,
    ),
    rule(
        PiiKind.PHONE,
        rf"(?:(?:\+1|001|1)[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-]?)[2-9]\d\d[ .-]?\d{{4}}"
        rf"{EXTENSION}",
        before=BEFORE,
    ),
    rule(
        PiiKind.PHONE,
        r"(?:\(0\d{1,5}\)[ /-]{0,2}|0\d{1,5}[ /-]{1,3})\d{3,8}(?:[ -]\d{2,5}){0,2}",
        r"0\d{8,11}",
        *(rf"0[1-9](?:{blank}\d\d){{4}}" for blank in (" ", r"\.", "-")),
        before=BEFORE,
        fit=trunk,
    ),
)
