"""National numbers of persons, each by its own rules and check digits."""

from __future__ import annotations

from collections import Counter

from deployments.guardrails.kinds import PiiKind
from deployments.guardrails.pii.rule import WORD, digits, rule

BEFORE = WORD + ".,"
DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"


def ssn(text: str) -> int:
    """United States: numbers that are never given out are none."""
    number = digits(text)
    area, group, serial = number[:3], number[3:5], number[5:]
    given_out = area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    return len(text) if given_out else 0


def nino(text: str) -> int:
    """United Kingdom: prefixes that are never given out."""
    return 0 if text[:2] in ("BG", "GB", "NK", "KN", "TN", "NT", "ZZ") else len(text)


def steuer_id(text: str) -> int:
    """Germany: one of the first ten comes twice or thrice; the last is ISO 7064 mod 11, 10."""
    number = digits(text)
    repeated = [times for times in Counter(number[:10]).values() if times > 1]
    if repeated not in ([2], [3]):
        return 0
    product = 10
    for digit in number[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return len(text) if (11 - product) % 10 == int(number[10]) else 0


def nir(text: str) -> int:
    """France: the last two complete the rest to a multiple of 97; Corsica counts as 19 and 18."""
    number = text.replace(" ", "").replace("2A", "19").replace("2B", "18")
    return len(text) if 97 - int(number[:13]) % 97 == int(number[13:]) else 0


def dni(text: str) -> int:
    """Spain: a letter for the remainder by 23; X, Y, Z of foreigners count as 0, 1, 2."""
    number = text[:-1].rstrip("-").replace("-", "")
    value = int(number.replace("X", "0").replace("Y", "1").replace("Z", "2"))
    return len(text) if DNI_LETTERS[value % 23] == text[-1] else 0


RULES = (
    rule(PiiKind.NATIONAL_ID, r"\d{3}-\d\d-\d{4}", r"\d{3} \d\d \d{4}", before=BEFORE, fit=ssn),
    rule(
        PiiKind.NATIONAL_ID,
        r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]",
        fit=nino,
    ),
    rule(PiiKind.NATIONAL_ID, r"[1-9]\d(?: ?\d{3}){3}", before=BEFORE, fit=steuer_id),
    rule(
        PiiKind.NATIONAL_ID,
        r"[12] ?\d\d ?\d\d ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d",
        before=BEFORE,
        fit=nir,
    ),
    rule(PiiKind.NATIONAL_ID, r"(?:\d{8}|[XYZ]-?\d{7})-?[A-Z]", before=BEFORE, fit=dni),
)
