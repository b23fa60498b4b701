"""What Python's syntax means here, and that no pattern can hang the gateway."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.guardrails.patterns import UNBOUNDED, automaton, read

ITEMS = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\d", r"\W", r"\.", " ", "(?i:b)", "ü", r"\b", "^", "$", r"\B"]
)
PATTERNS = st.recursive(
    ITEMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: f"(?:{'|'.join(some)})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{0,2}", "{1,3}?", "{2,}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda one: f"({one})"),
    ),
    max_leaves=8,
)
TEXTS = st.text(alphabet="abAB1. ü\n-", max_size=8)


def takes(source: str) -> bool:
    try:
        read(source)
    except ValueError:
        return False
    return True


SOURCES = PATTERNS.filter(takes)


@given(source=SOURCES, text=TEXTS)
def test_it_means_what_python_says(source: str, text: str) -> None:
    ours = automaton(read(source).match).search(text.encode())
    theirs = re.compile(source, re.MULTILINE | re.ASCII).search(text)
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert ours.start() == len(text[: theirs.start()].encode())
        assert ours.end() >= len(text[: theirs.end()].encode())  # the longest, not the first


@settings(max_examples=300)
@given(source=SOURCES, text=TEXTS, more=TEXTS)
def test_every_beginning_of_a_match_is_known(source: str, text: str, more: str) -> None:
    """Also where the anchors at its end come to hold only with what follows."""
    pattern = read(source)
    whole, beginnings = automaton(pattern.match), automaton(rf"(?:{pattern.beginnings})\z")
    found = whole.search((text + more).encode())
    if found is None or found.end() < len(text.encode()) or found.start() > len(text.encode()):
        return
    assert beginnings.search(text.encode()).start() <= found.start()


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("abc", "abc"),
        ("(?:ab){2,4}c", "abababc"),
        ("(?:ab)*c", "abababc"),
        ("x(?:a|bc|(?:d{3}e)?f)+y", "xabcdddeffdddefy"),
        (r"(?i)k\b.(?:Z\d?){2}", "K-z1Z"),
        (r"a$\n^b", "a\nb"),
        ("ü{3}", "üüü"),
    ],
)
def test_a_match_grows_from_its_beginnings(source: str, match: str) -> None:
    pattern = read(source)
    assert automaton(pattern.match).fullmatch(match.encode())
    beginnings = automaton(rf"(?:{pattern.beginnings})\z")
    for end in range(len(match) + 1):
        assert beginnings.search(f"-{match[:end]}".encode(), 1).start() == 1
    assert beginnings.search(f"{match}-".encode()).start() == len(match.encode()) + 1


@given(source=SOURCES, text=TEXTS)
def test_a_bounded_pattern_holds_back_no_more_than_its_width(source: str, text: str) -> None:
    pattern = read(source)
    held = automaton(rf"(?:{pattern.beginnings})\z").search(text.encode()).start()
    if pattern.width < UNBOUNDED:
        assert len(text.encode()[held:].decode()) <= pattern.width


@pytest.mark.parametrize(
    ("source", "width"),
    [("abc", 3), ("a{2,5}b?", 6), ("a|bcd", 3), (r"(?i)\bfoo\s{1,3}bar", 9)],
)
def test_the_longest_match_is_known(source: str, width: int) -> None:
    assert read(source).width == width


@pytest.mark.parametrize("source", ["a*b", "(a+)+b", "x.*"])
def test_that_there_is_no_longest_match_is_known_too(source: str) -> None:
    assert read(source).width >= UNBOUNDED


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("(", "not a regular expression"),
        (r"\pL", "bad escape"),
        ("[[:alpha:]]", "nested set"),
        ("a(?=b)", "a look-around"),
        (r"(a)\1", "a back-reference"),
        ("(?>a)b", "a possessive group"),
        ("a++b", "a possessive group"),
        (r"\Afoo", "write ^ or $"),
        ("a*", "matches the empty text"),
        (r"\b", "matches the empty text"),
    ],
)
def test_what_is_no_pattern_here(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        read(source)


def test_a_pattern_that_is_too_large_for_the_engine() -> None:
    with pytest.raises(ValueError, match="too large or not supported"):
        automaton(read("(?:(?:a{1000}){1000}){1000}").match)


@pytest.mark.parametrize(
    "source", ["(a+)+b", "(a|a)*b", "(a|aa)+$b", "(.*a){20}b", "^(a?){50}a{50}b"]
)
def test_a_regex_bomb_does_not_go_off(source: str) -> None:
    assert automaton(read(source).match).search(b"a" * 100_000) is None
