"""Rules held against a text, whole or as it comes. Both are the same code, and the same result.

Read from left to right: the match that begins first counts, of several there the longest, of
several as long the rule named first; reading goes on behind it. Whether a match begins at a
place is decided once nothing that may still come could change it, and not earlier. So how a
text is cut into pieces makes no difference (``tests/guardrails/test_screen.py`` proves it).

Texts are UTF-8 while they are looked at: RE2 counts in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deployments.guardrails.kinds import Action
from deployments.guardrails.patterns import automaton
from deployments.guardrails.rules import Rule

START = b"\n"
"""Stands before a text, as a line break would: there is always a character before a match."""


class Match(NamedTuple):
    """In the order of preference."""

    start: int
    after: int
    """Minus the length."""
    rule: int
    """Its number."""

    @property
    def end(self) -> int:
        return self.start - self.after


@dataclass(frozen=True, slots=True)
class Seen:
    shown: bytes
    at: int
    """Up to where the text is decided."""
    refused: Rule | None = None
    """What was found there that ends the text."""
    masked: Sequence[Rule] = ()
    """What was masked before, once for each place."""


class Screen:
    """Rules, the earlier one first where two fit alike, with what to do about each.

    Raises:
        ValueError: an expression is too large for RE2.
    """

    def __init__(self, rules: Sequence[tuple[Rule, Action]]) -> None:
        self._rules = [pair for pair in rules if pair[1] is not Action.ALLOW]
        self._automata = [automaton(rule.expression) for rule, _ in self._rules]
        # Nearly all text has nothing in it: one pass tells, instead of one a rule.
        self._any = automaton("|".join([rule.plain for rule, _ in self._rules]))
        beginnings = "|".join([rule.pattern.beginnings for rule, _ in self._rules])
        self._beginnings = automaton(rf"(?:{beginnings})\z")

    def undecided(self, text: bytes, at: int) -> int:
        """From where on, at or behind ``at``, a match could begin that needs what is yet to come.

        It is the length of ``text`` where there is none.
        """
        found: int = self._beginnings.search(text, at).start()
        return found

    def scan(self, text: bytes, at: int, limit: int) -> Seen:
        """Decide ``text`` from ``at`` to ``limit``; one character at least stands before ``at``."""
        shown: list[bytes] = []
        masked: list[Rule] = []
        ahead: list[Match | None] = []
        if self._any.search(text, _back(text, at)) is not None:
            ahead = [self._next(number, text, at) for number in range(len(self._rules))]
        while found := [match for match in ahead if match is not None and match.start < limit]:
            match = min(found)
            rule, action = self._rules[match.rule]
            shown.append(text[at : match.start])
            if action is Action.REFUSE:
                return Seen(b"".join(shown), match.start, rule, masked)
            shown.append(rule.mask.encode())
            masked.append(rule)
            at = match.end
            ahead = [
                self._next(number, text, at) if one is not None and one.start < at else one
                for number, one in enumerate(ahead)
            ]
        if at < limit:
            shown.append(text[at:limit])
            at = limit
        return Seen(b"".join(shown), at, masked=masked)

    def _next(self, number: int, text: bytes, at: int) -> Match | None:
        """The first match of a rule that begins at or behind ``at``."""
        rule, _ = self._rules[number]
        search: Any = self._automata[number].search
        before = _back(text, at)
        while (found := search(text, before)) is not None:
            start, end = found.span(1)
            candidate = text[start:end].decode()
            counted = rule.fit(candidate)
            if counted:
                length = len(candidate[:counted].encode())
                return Match(start, -length, number)
            before = start
        return None


def _back(text: bytes, at: int) -> int:
    """Where the character before ``at`` begins."""
    at -= 1
    while text[at] & 0xC0 == 0x80:
        at -= 1
    return at


class Masker:
    """One text on its way through a screen, a piece at a time."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._text = START
        """The last character that is decided, and all that is not."""
        self._at = len(START)
        self.refused: Rule | None = None
        """What ended the text: nothing is shown from there on."""
        self.masked: list[Rule] = []
        """What was masked so far, once for each place; whoever counts may empty it."""

    def push(self, text: str, *, last: bool = False) -> str:
        """What may be shown now that ``text`` is there too; ``last``: nothing more will come."""
        if self.refused is not None:
            return ""
        data = self._text + text.encode("utf-8", "replace")
        limit = len(data) if last else self._screen.undecided(data, self._at)
        seen = self._screen.scan(data, self._at, limit)
        self.refused = seen.refused
        self.masked += seen.masked
        before = _back(data, seen.at)
        self._text, self._at = data[before:], seen.at - before
        return seen.shown.decode()

    @property
    def held(self) -> int:
        """Characters that are held back."""
        return len(self._text[self._at :].decode())
