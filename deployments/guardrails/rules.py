"""One thing to look for in a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deployments.guardrails.patterns import Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A pattern between what may stand around it, and a check of what was found.

    Whether it holds at a place depends on one character before that place and on at most
    ``pattern.width`` and one more from there on: what a stream has to hold back is bounded.
    """

    guardrail: str
    """``pii`` or ``blocked``."""
    category: str
    pattern: Pattern
    before: str = ""
    """The inside of an RE2 set: characters that may not stand just before a match."""
    after: str = ""
    """The same for just behind it."""
    fit: Callable[[str], int] = len
    """How many characters of a match count, from its first on; 0: it was none. For check digits,
    and for lengths that depend on what was found."""

    @property
    def mask(self) -> str:
        return f"[{self.category.upper()}]"

    @property
    def expression(self) -> str:
        """For RE2: the character before, the match as the only group, the character behind."""
        return self._between(f"({self.pattern.match})")

    @property
    def plain(self) -> str:
        """The same without a group."""
        return self._between(f"(?:{self.pattern.match})")

    def _between(self, match: str) -> str:
        before = f"[^{self.before}]" if self.before else "(?s:.)"
        after = rf"(?:[^{self.after}]|\z)" if self.after else ""
        return f"{before}{match}{after}"
