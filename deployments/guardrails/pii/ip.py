"""Addresses of the Internet Protocol; whether one is valid is for the standard library to say."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from deployments.guardrails.kinds import PiiKind
from deployments.guardrails.pii.rule import WORD, rule

TELLING = re.compile(r"[0-9A-Fa-f]{3}")
GROUPS = 3
"""``1::2`` may be a slice of a list; an address of a network says more."""


def ip4(text: str) -> int:
    try:
        IPv4Address(text)
    except AddressValueError:
        return 0
    return len(text)


def ip6(text: str) -> int:
    address = text[:-1] if text.endswith(":") and not text.endswith("::") else text
    groups = [group for group in address.split(":") if group]
    if len(groups) < GROUPS and not any(map(TELLING.match, groups)):
        return 0
    try:
        IPv6Address(address)
    except AddressValueError:
        return 0
    return len(address)


RULES = (
    rule(
        PiiKind.IP,
        r"\d{1,3}(?:\.\d{1,10}){3,9}",  # all of a longer number with dots, which is none
        before=WORD + ".",
        fit=ip4,
    ),
    rule(
        PiiKind.IP,
        r"(?:[0-9A-Fa-f]{0,4}:){2,8}(?:[0-9A-Fa-f]{0,4}|\d{1,3}(?:\.\d{1,3}){3})",
        before=WORD + ".",
        after=WORD + ":",
        fit=ip6,
    ),
)
