"""A text is masked alike however it is cut; and only what could still become a match waits."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deployments.guardrails import blocked
from deployments.guardrails.kinds import Action
from deployments.guardrails.pii import RULES
from deployments.guardrails.rules import Rule
from deployments.guardrails.screen import Masker, Screen

PII = [rule for rules in RULES.values() for rule in rules]
BLOCKED = [
    *blocked.rules("plans", ["red", "red flag", "Straße", "赌博"], []),
    *blocked.rules("codes", [], [r"(?i)\bproject[- ]x\d{1,3}\b", r"^key: .{1,20}$", "a-?b-?c"]),
]
MASKING = Screen([(rule, Action.MASK) for rule in [*BLOCKED, *PII]])
REFUSING = Screen(
    [
        *((rule, Action.REFUSE) for rule in BLOCKED),
        *((rule, Action.MASK) for rule in PII),
    ]
)
WIDEST = max(rule.pattern.width for rule in [*BLOCKED, *PII])

FRAGMENTS = st.sampled_from(
    [
        "jane.doe@example.org", "@", "a@b.co", ".", "DE89 3704 0044 0532 0130 00", "GB82WEST",
        "4111 1111 1111 1111", "4111111111111111", "378282246310005", "123-45-6789",
        "AB 12 34 56 C",
        "86095742719", "12345678Z", "+49 (0)30 901820", "030 123456", "(555) 234-5678", "x12",
        "192.168.0.1", "2001:db8::1", "::", "01/02/2024", "red", " flag", "ged", "Straße", "我赌博",
        "project x", "key: ", "\n", "a-b", "c", " ", "-", "1", "0", "e\u0301", "é",
        "\N{GRINNING FACE}",
    ]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join)


@st.composite
def cut(draw: st.DrawFn) -> list[str]:
    """A text in pieces, some of them empty."""
    text = draw(TEXTS)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=20)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def whole(screen: Screen, text: str) -> tuple[str, Rule | None]:
    masker = Masker(screen)
    return masker.push(text, last=True), masker.refused


def streamed(screen: Screen, pieces: list[str]) -> tuple[str, Rule | None]:
    masker = Masker(screen)
    shown = ""
    for number, piece in enumerate(pieces):
        shown += masker.push(piece, last=number == len(pieces) - 1)
        assert masker.refused is not None or masker.held <= WIDEST
    return shown, masker.refused


@pytest.mark.parametrize("screen", [MASKING, REFUSING], ids=["masking", "refusing"])
@settings(max_examples=400)
@given(pieces=cut())
@example(pieces=["write to jane.d", "oe@exam", "ple.org now"])
@example(pieces=["4111 1111 ", "1111 1111", "1"])
def test_how_a_text_is_cut_makes_no_difference(screen: Screen, pieces: list[str]) -> None:
    assert streamed(screen, pieces) == whole(screen, "".join(pieces))


@settings(max_examples=100)
@given(text=TEXTS)
def test_one_character_at_a_time(text: str) -> None:
    assert streamed(MASKING, [*text, ""]) == whole(MASKING, text)


def test_prose_flows() -> None:
    """At most the last word waits, for it could be the beginning of an address."""
    masker = Masker(MASKING)
    shown = masker.push("The capital of France is Par")
    assert shown == "The capital of France is "
    assert masker.push("is. It") == "Paris. "
    assert masker.push("\n") == "It\n"


def test_a_refusal_shows_what_was_before_and_nothing_after() -> None:
    masker = Masker(REFUSING)
    assert masker.push("mail a@b.co from Stra") == "mail [EMAIL] from "
    assert masker.push("ße") == ""
    assert masker.refused is None  # it may yet be "Straßen", which is another word
    assert masker.push("n, then? and straße!") == "Straßen, then? and "
    assert masker.refused is not None
    assert masker.refused.category == "plans"
    assert masker.push("more", last=True) == ""


def test_the_first_counts_then_the_longest_then_the_order() -> None:
    rules = [
        *blocked.rules("short", [], ["abc"]),
        *blocked.rules("long", [], ["abcd"]),
        *blocked.rules("same", [], ["abc[de]"]),
        *blocked.rules("later", [], ["bcdefgh"]),
    ]
    screen = Screen([(rule, Action.MASK) for rule in rules])
    assert whole(screen, "abcdefgh abce abc")[0] == "[LONG]efgh [SAME] [SHORT]"


def test_what_is_allowed_is_not_looked_for() -> None:
    screen = Screen([(rule, Action.ALLOW) for rule in PII] + [(BLOCKED[0], Action.MASK)])
    assert whole(screen, "a@b.co is red")[0] == "a@b.co is [PLANS]"
