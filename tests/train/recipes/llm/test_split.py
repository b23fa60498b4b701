"""What is held out shares no paragraph with what is trained on."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from train.recipes.llm import builtin
from train.recipes.llm.rows import Chat, Message, Origin, Text
from train.recipes.llm.split import PARAGRAPH, split

PARAGRAPHS = [f"{i} " + "lorem ipsum dolor " * 5 for i in range(30)]


def document(*paragraphs: int) -> Origin:
    text = "\n\n".join(PARAGRAPHS[i] for i in paragraphs)
    return Origin(Text(text=text), f"doc{paragraphs}")


def paragraphs_of(origins: list[Origin]) -> set[str]:
    texts = [o.row.text for o in origins if isinstance(o.row, Text)]
    return {" ".join(p.split()) for text in texts for p in text.split("\n\n")}


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=3), min_size=8, max_size=30),
    st.randoms(use_true_random=False),
)
def test_sides_share_nothing_and_order_does_not_matter(
    contents: list[list[int]], shuffle: random.Random
) -> None:
    rows = [document(*content) for content in contents]
    try:
        train, held = split(rows, 0.4)
    except ConfigError:
        return
    assert len(train) + len(held) == len(rows)
    assert train
    assert not paragraphs_of(train) & paragraphs_of(held)
    shuffle.shuffle(rows)
    again = split(rows, 0.4)[1]
    assert sorted(o.where for o in again) == sorted(o.where for o in held)


def test_the_language_reference_leaks_nothing() -> None:
    rows = builtin.load("builtin:pydoc")
    train, held = split(rows, 0.1)
    long = {p for p in paragraphs_of(held) if len(p) >= PARAGRAPH}
    assert not long & paragraphs_of(train)
    characters = [sum(len(o.row.text) for o in part) for part in (train, held)]  # type: ignore[union-attr]
    assert 0.08 <= characters[1] / sum(characters) <= 0.12
    assert len(held) >= 3


def test_conversations_with_one_question_stay_together() -> None:
    def chat(question: str, answer: str) -> Origin:
        messages = [("system", "Be brief."), ("user", question), ("assistant", answer)]
        return Origin(
            Chat(messages=tuple(Message(role=r, content=c) for r, c in messages)),
            f"{question}{answer}",
        )

    rows = [chat(f"q{i}", answer) for i in range(20) for answer in "ab"]
    train, held = split(rows, 0.3)
    questions = [{o.where[:-1] for o in part} for part in (train, held)]
    assert questions[1]
    assert not questions[0] & questions[1]


def test_one_document_is_cut_in_two() -> None:
    train, held = split([document(*range(20))], 0.25)
    assert len(paragraphs_of(held)) in (4, 5)
    assert len(paragraphs_of(train) | paragraphs_of(held)) == 20
    assert not paragraphs_of(train) & paragraphs_of(held)
    with pytest.raises(ConfigError, match="one document of one line"):
        split([document(0)], 0.25)


def test_too_small_a_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.held_out"):
        split([document(0), document(1)], 0.1)
