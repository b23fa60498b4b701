from __future__ import annotations

import pytest

from deployments.guardrails import blocked
from deployments.guardrails.kinds import Action
from deployments.guardrails.screen import Masker, Screen


def masked(text: str, words: tuple[str, ...] = (), patterns: tuple[str, ...] = ()) -> str:
    rules = blocked.rules("bad", words, patterns)
    return Masker(Screen([(rule, Action.MASK) for rule in rules])).push(text, last=True)


@pytest.mark.parametrize(
    ("word", "text", "expected"),
    [
        ("bomb", "A BOMB, bombs; bomb", "A [BAD], bombs; [BAD]"),
        ("bomb", "“bomb” bombé _bomb", "“[BAD]” bombé _bomb"),
        ("pipe bomb", "pipe  bomb pipe\nbomb pipebomb", "[BAD] [BAD] pipebomb"),
        ("Übel", "übel verübeln", "[BAD] verübeln"),
        ("c++", "c++ and C++11 abc++", "[BAD] and [BAD]11 abc++"),
        (".onion", "see x.onion or x.onions", "see x[BAD] or x.onions"),
        ("赌博", "网上赌博网站", "网上[BAD]网站"),
        ("a.b", "a.b axb", "[BAD] axb"),
        ("cafe", "cafe\u0301 cafe", "cafe\u0301 [BAD]"),
    ],
)
def test_words(word: str, text: str, expected: str) -> None:
    assert masked(text, (word,)) == expected


def test_a_word_that_begins_another() -> None:
    assert (
        masked("red, red flag, red flagged", ("red", "red flag")) == "[BAD], [BAD], [BAD] flagged"
    )


def test_patterns() -> None:
    assert masked("ID-12 id-123\nx: 1\n y: 2", patterns=(r"(?i)\bid-\d{2}\b", r"^[a-z]: \d$")) == (
        "[BAD] id-123\n[BAD]\n y: 2"
    )


def test_thousands_of_words() -> None:
    words = tuple(f"word{number}x" for number in range(5000))
    assert masked("word17x word4999x word5000x word17", words) == "[BAD] [BAD] word5000x word17"
