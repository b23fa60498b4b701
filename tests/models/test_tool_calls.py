"""Text with tool calls in it, read as it comes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.contracts import ToolCall
from models.tool_calls import BETWEEN, Allowed, Reader, written

NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.integers() | st.text('ab"\\{}[]<>é', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text('ab"\\{}', max_size=3), VALUES, max_size=3)
CALLS = st.lists(st.tuples(NAMES, OBJECTS), max_size=3)
SAID = st.text("a <\n", max_size=8).filter(lambda text: "<tool_call>" not in text)


def texts(calls: Sequence[tuple[str, object]]) -> list[str]:
    return [written(ToolCall(id="", name=n, arguments=json.dumps(a))) for n, a in calls]


def read(pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """The content, and of each call its name and arguments."""
    reader, content, found = Reader(), "", list[list[str]]()
    for number, piece in enumerate(pieces):
        said, calls = reader.push(piece, last=number == len(pieces) - 1)
        content += said
        for call in calls:
            if call.name is not None:
                assert call.index == len(found)
                found.append([call.name, ""])
            found[call.index][1] += call.arguments
        assert len({call.index for call in calls}) == len(calls), "one piece a call"
    return content, [(name, arguments) for name, arguments in found]


@given(said=SAID, calls=CALLS, cuts=st.lists(st.integers(0, 400), max_size=12))
@example(said="a \n", calls=[("f", {})], cuts=[1, 2, 3, 4])
@example(said=" \n<tool_cal", calls=[], cuts=[3, 7])
def test_however_it_is_cut(
    said: str, calls: Sequence[tuple[str, object]], cuts: Sequence[int]
) -> None:
    text = said + BETWEEN.join(texts(calls))
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    content, found = read([text[begin:end] for begin, end in pairwise(places)])
    assert content == (said.rstrip() if calls else said)
    assert [(name, json.loads(arguments)) for name, arguments in found] == list(calls)


@given(calls=CALLS.filter(bool), at=st.integers(0, 400))
def test_what_is_cut_short_is_told_as_far_as_it_has_come(
    calls: Sequence[tuple[str, object]], at: int
) -> None:
    whole = BETWEEN.join(texts(calls))
    content, found = read([whole[:at]])
    for (name, arguments), (expected, all_arguments) in zip(found, calls, strict=False):
        assert name == expected
        assert json.dumps(all_arguments).startswith(arguments)
    assert found or content == whole[:at]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nno JSON\n</tool_call>",
        '<tool_call>\n{"name": "f g", "arguments": {}}\n</tool_call>',
        "a < b <tool_cal",
        "<tool_call>" + " " * 300,
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert read([text]) == read(list(text)) == (text, [])


def test_text_is_not_kept_back_without_need() -> None:
    reader = Reader()
    assert [reader.push(piece)[0] for piece in ("He", "llo ", "<b> ", "<tool", "x", "\n", "y")] == [
        "He",
        "llo",
        " <b>",
        "",
        " <toolx",
        "",
        "\ny",
    ]


def test_many_blanks_take_no_time_to_speak_of() -> None:
    reader = Reader()
    assert all(reader.push("\n" * 10) == ("", []) for _ in range(2_000))
    assert reader.push("", last=True) == ("\n" * 20_000, [])


def test_what_is_allowed_crosses_as_a_grammar() -> None:
    allowed = Allowed(
        tools={"f": {"type": "object"}}, required=True, parallel=False, answer={"type": "null"}
    )
    assert Allowed.of(allowed.as_grammar()) == allowed
