"""Blocked categories: words and patterns that somebody listed under a name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from deployments.guardrails.patterns import read
from deployments.guardrails.rules import Rule

GUARDRAIL = "blocked"
PART_OF_A_WORD = r"\p{L}\p{M}\p{N}_"
UNSPACED = "\N{THAI CHARACTER KO KAI}"
"""From here on most scripts write words without spaces between them."""


def rules(category: str, words: Iterable[str], patterns: Iterable[str]) -> Iterator[Rule]:
    """Raises ValueError: a pattern that is none."""
    yield from word_rules(category, words)
    for source in patterns:
        yield Rule(guardrail=GUARDRAIL, category=category, pattern=read(source))


def word_rules(category: str, words: Iterable[str]) -> Iterator[Rule]:
    """Whole words and phrases, in any case, with any few blanks between the words of a phrase.

    Where a script has no spaces, a word cannot be told from a part of one and counts anywhere.
    """
    by_edges: defaultdict[tuple[bool, bool], list[str]] = defaultdict(list)
    for word in words:
        text = word.strip()
        by_edges[_spaced(text[:1]), _spaced(text[-1:])].append(
            r"\s{1,3}".join([re.escape(part) for part in text.split()])
        )
    for (first, last), sources in by_edges.items():
        yield Rule(
            guardrail=GUARDRAIL,
            category=category,
            pattern=read(f"(?i)(?:{'|'.join(sources)})"),
            before=PART_OF_A_WORD if first else "",
            after=PART_OF_A_WORD if last else "",
        )


def _spaced(edge: str) -> bool:
    return edge < UNSPACED and (edge.isalnum() or edge == "_")
