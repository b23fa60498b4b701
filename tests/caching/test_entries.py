"""What comes out is what went in; what is not ours is nothing."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.caching.entries import (
    Embedded,
    pack_answer,
    pack_embedding,
    unpack_answer,
    unpack_embedding,
    whole,
)
from models.contracts import Delta, FinishReason, Timings, TokenLogprob, TopLogprob, Usage

USAGE = Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=1)
TIMINGS = Timings(queue_s=0, prefill_s=0, ttft_s=0, decode_s=0, total_s=0)

TEXTS = st.text(st.characters(), max_size=8)  # surrogates, too
LOGS = st.floats(allow_nan=False)
LOGPROBS = st.builds(
    TokenLogprob,
    token_id=st.integers(0, 2**31),
    token=TEXTS,
    logprob=LOGS,
    top=st.lists(
        st.builds(TopLogprob, token_id=st.integers(0, 9), token=TEXTS, logprob=LOGS), max_size=2
    ).map(tuple),
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[Delta], int]:
    """The deltas of ``n`` choices, interleaved, each choice ended by its last."""
    n = draw(st.integers(1, 3))
    asked = draw(st.booleans())
    deltas = []
    left = {index: draw(st.integers(1, 4)) for index in range(n)}
    while left:
        index = draw(st.sampled_from(sorted(left)))
        left[index] -= 1
        last = left[index] == 0
        if last:
            del left[index]
        deltas.append(
            Delta(
                index=index,
                text=draw(TEXTS),
                token_ids=tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
                logprobs=tuple(draw(st.lists(LOGPROBS, max_size=2))) if asked else None,
                finish_reason=draw(st.sampled_from(FinishReason)) if last else None,
                usage=USAGE if not left else None,
                timings=TIMINGS if not left else None,
            )
        )
    return deltas, n


@given(streams())
def test_an_answer_survives(stream: tuple[list[Delta], int]) -> None:
    deltas, n = stream
    answer = whole(deltas, n)
    assert answer is not None
    assert unpack_answer(pack_answer(answer), n) == answer
    for index, choice in enumerate(answer):
        parts = [delta for delta in deltas if delta.index == index]
        assert choice.text == "".join(part.text for part in parts)
        assert choice.token_ids == tuple(i for part in parts for i in part.token_ids)
        assert choice.finish_reason is parts[-1].finish_reason
        said = [one for part in parts for one in part.logprobs or ()]
        assert list(choice.logprobs or ()) == said
        assert (choice.logprobs is None) == (parts[0].logprobs is None)
    assert [choice.usage for choice in answer] == [None] * (n - 1) + [USAGE]
    assert whole(deltas[:-1], n) is None
    assert whole(answer, n) == answer


def test_what_cannot_be_is_minus_infinity() -> None:
    logprobs = (TokenLogprob(token_id=1, token="x", logprob=-math.inf),)
    end = Delta(logprobs=logprobs, finish_reason=FinishReason.STOP, usage=USAGE)
    assert unpack_answer(pack_answer([end]), 1) == [end]


def test_an_answer_without_usage_is_not_complete() -> None:
    assert whole([Delta(finish_reason=FinishReason.STOP)], 1) is None
    assert whole([], 1) is None


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b'{"usage":[1,2],"choices":[]}',
        b'{"usage":[1,2,3],"choices":[["a",[],"bored",null]]}',
        b'{"usage":[1,2,3],"choices":[["a",[]]]}',
        b'{"usage":[1,2,3],"choices":[["a",[],"stop",[[1]]]]}',
        b'{"usage":[1,2,3],"choices":7}',
        pickle.dumps(Delta()),
    ],
)
def test_what_is_not_ours_is_nothing(value: bytes) -> None:
    assert unpack_answer(value, 1) is None
    assert unpack_embedding(value[:3]) is None


def test_another_number_of_choices_is_another_answer() -> None:
    value = pack_answer([Delta(finish_reason=FinishReason.STOP, usage=USAGE)])
    assert unpack_answer(value, 2) is None


@given(st.lists(st.floats(width=32), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_a_vector_survives(numbers: list[float], tokens: int) -> None:
    for vector in (np.array(numbers, np.float32), numbers):
        embedded: Any = unpack_embedding(pack_embedding(Embedded(vector=vector, tokens=tokens)))
        assert embedded.tokens == tokens
        assert np.array_equal(embedded.vector, np.asarray(vector), equal_nan=True)
        assert embedded.vector.dtype == np.asarray(vector).dtype


def test_a_damaged_vector_is_nothing() -> None:
    value = pack_embedding(Embedded(vector=[0.5], tokens=1))
    assert unpack_embedding(value[:-1]) is None
    assert unpack_embedding(b"x" + value[1:]) is None
