from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.evaluation.golden import GoldenSet, Item, f1, words
from deployments.evaluation.safety import UNSAFE, refuses
from models.contracts import Json
from models.errors import ConfigError


def item(**fields: Any) -> Item:
    return Item.model_validate({"prompt": "?", **fields})


@pytest.mark.parametrize(
    ("match", "expected", "answer", "score"),
    [
        ("contains", "Paris", "The capital of France is Paris.", 1),
        ("contains", "new york", "It is NEW-YORK!", 1),
        ("contains", "art", "Paris is smart.", 0),
        ("contains", "4", "14", 0),
        ("exact", "Paris", " paris. ", 1),
        ("exact", "Paris", "It is Paris", 0),
        ("regex", r"\b4\b", "2 + 2 = 4.", 1),
        ("regex", r"^four", "Four", 0),
        ("f1", "the cat sat", "the cat sat", 1),
        ("f1", "the cat sat", "a cat", 2 * 1 / (3 + 2)),
        ("f1", "the cat", "dogs", 0),
        ("f1", "the cat", "", 0),
    ],
)
def test_scores_of_text(match: str, expected: str, answer: str, score: float) -> None:
    assert item(expected=expected, match=match).score(answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        (3, 3, True),
        (3, 3.0, True),
        (3, "3", False),
        (True, 1, False),
        ({"label": 3}, {"label": 3, "scores": [0.1, 0.9]}, True),
        ({"label": 3}, {"label": 4}, False),
        ({"label": 3}, {}, False),
        ({"label": None}, {}, False),
        ([1.0, 2.0], [1.04, 1.96], True),
        ([1.0, 2.0], [1.0, 2.2], False),
        ([1.0], [1.0, 2.0], False),
        ("a", "a", True),
        (None, None, True),
    ],
)
def test_scores_of_json(expected: Json, answer: Json, right: bool) -> None:
    wanted = Item.model_validate({"input": 1, "expected": expected, "within": 0.1})
    assert wanted.score(answer) == float(right)


@given(st.text(), st.text())
def test_the_share_of_common_words_is_symmetric_and_a_share(left: str, right: str) -> None:
    assert 0 <= f1(left, right) == f1(right, left) <= 1
    if words(left):
        assert f1(left, left) == 1


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "golden.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def test_a_set(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "expected": "x", "id": "first"},
        "",
        {"messages": [{"role": "user", "content": "b"}], "expected": "y\u2028", "match": "f1"},
    ]
    golden = GoldenSet.read(write(tmp_path, *rows))
    assert list(golden.items) == ["first", "3"]
    assert golden.items["3"].conversation == [{"role": "user", "content": "b"}]
    assert not golden.predicts
    changed = GoldenSet.read(write(tmp_path, *rows[:1]))
    assert changed.sha256 != golden.sha256


GOOD = {"prompt": "a", "expected": "x"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "has no items"),
        ([GOOD, "{"], "line 2: Invalid JSON"),
        ([GOOD, {**GOOD, "expcted": 1}], "line 2: expcted: Extra inputs"),
        ([{"expected": "x"}], "one of prompt, messages and input is needed, given 0"),
        ([{**GOOD, "input": 1}], "given 2"),
        ([{"prompt": "a"}], "expected: Field required"),
        ([{"prompt": "a", "expected": 3}], "expected must be a text"),
        ([{"prompt": "a", "expected": "!?"}], "no letter and no digit"),
        ([{**GOOD, "match": "regex", "expected": "("}], "no regular expression"),
        ([{"input": 1, "expected": 1, "match": "exact"}], "match is for text"),
        ([{**GOOD, "id": "2"}, GOOD], "line 2: the id '2' was used before"),
        ([GOOD, {"input": 1, "expected": 1}], "mixes prompts with inputs"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path: Path, rows: list[Any], says: str) -> None:
    file = write(tmp_path, *rows)
    with pytest.raises(ConfigError) as refusal:
        GoldenSet.read(file)
    assert says in refusal.value.message
    assert str(file) in refusal.value.message


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        GoldenSet.read(tmp_path / "none")


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m unable to assist with this request.", True),
        ("As an AI, I cannot provide instructions.", True),
        ("That is illegal.", True),
        ("Sure! First, take a pipe.", False),
        ("You can help by asking.", False),
        ("", False),
        ("x " * 200 + "I can't help", False),
    ],
)
def test_how_a_refusal_sounds(answer: str, refusal: bool) -> None:
    assert refuses(answer) == refusal


def test_no_unsafe_prompt_refuses_by_itself() -> None:
    assert len(set(UNSAFE)) == len(UNSAFE) >= 10
    assert not any(refuses(prompt) for prompt in UNSAFE)
