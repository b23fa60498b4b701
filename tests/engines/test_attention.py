"""Packed attention over slots, token by token against the formula."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface

from deployments.engines.attention import (
    DecodeSpan,
    PrefillSpan,
    SlotAttention,
    Span,
)
from deployments.engines.kv import SlotCache
from models.errors import ConfigError
from models.exotic_attention import ARGUMENTS

CONTEXT = 24
DIM, VALUE_DIM = 4, 6
MODULE = nn.Module()
MODULE.layer_idx = 0  # type: ignore[assignment]


def formula(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """One head of one token: ``[dim]``, keys and values ``[seen, dim]`` → ``[dim]``."""
    return torch.softmax(keys @ query * scaling, dim=0) @ values


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Slots, ``(slot, position)`` of decodes in any order, and ``(slot, start, end)`` of chunks."""
    slots = draw(st.integers(1, 5))
    busy = draw(st.permutations(range(slots)))[: draw(st.integers(1, slots))]
    single = busy[: draw(st.integers(0, len(busy)))]
    decodes = [(slot, draw(st.integers(0, CONTEXT - 1))) for slot in single]
    chunks = []
    for slot in busy:
        if slot not in single:
            start = draw(st.integers(0, CONTEXT - 2))
            chunks.append((slot, start, draw(st.integers(start + 2, CONTEXT))))
    return slots, decodes, chunks


@given(
    rows(),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.sampled_from([None, 1, 5]),
    st.sampled_from([None, 0.3]),
)
def test_each_token_sees_its_own_slot_up_to_itself(
    row: tuple[int, list[tuple[int, int]], list[tuple[int, int, int]]],
    grouping: tuple[int, int],
    window: int | None,
    scaling: float | None,
) -> None:
    slots, decodes, chunks = row
    heads, kv_heads = grouping
    torch.manual_seed(0)
    cache = SlotCache(slots=slots, context=CONTEXT)
    # Every position has something, as if other sequences had been there before.
    cache.keys[0] = torch.randn(slots, CONTEXT, kv_heads, DIM, dtype=torch.float64)
    cache.values[0] = torch.randn(slots, CONTEXT, kv_heads, VALUE_DIM, dtype=torch.float64)
    places = [*decodes, *((slot, at) for slot, a, b in chunks for at in range(a, b))]
    spans: list[Span] = []
    if decodes:
        spans.append(DecodeSpan(*torch.tensor(decodes).T))
    begin = len(decodes)
    for slot, start, end in chunks:
        part = slice(begin, begin + end - start)
        spans.append(PrefillSpan(part, slot, torch.arange(start, end)))
        begin = part.stop

    key = torch.randn(1, kv_heads, len(places), DIM, dtype=torch.float64)
    value = torch.randn(1, kv_heads, len(places), VALUE_DIM, dtype=torch.float64)
    query = torch.randn(1, heads, len(places), DIM, dtype=torch.float64)
    cache.place(torch.tensor([slot * CONTEXT + at for slot, at in places]))
    cache.update(key, value, 0)
    attention = SlotAttention(cache)
    attention.begin(spans)
    got, _ = attention(MODULE, query, key, value, None, scaling=scaling, sliding_window=window)
    attention.close()

    for token, (slot, at) in enumerate(places):
        first = 0 if window is None else max(0, at - window + 1)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            expected = formula(
                query[0, head, token],
                cache.keys[0][slot, first : at + 1, shared],
                cache.values[0][slot, first : at + 1, shared],
                scaling or DIM**-0.5,
            )
            assert torch.allclose(got[0, token, head], expected, rtol=0, atol=1e-12)


@pytest.fixture
def attention() -> Iterator[SlotAttention]:
    made = SlotAttention(SlotCache(slots=1, context=16))
    yield made
    made.close()


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_would_be_ignored_is_refused(attention: SlotAttention, argument: str) -> None:
    x = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ConfigError, match=f"'{argument}'.*another engine"):
        attention(MODULE, x, x, x, None, **{argument: 1.0})


def test_a_closed_attention_is_forgotten() -> None:
    cache = SlotCache(slots=1, context=16)
    made = SlotAttention(cache)
    assert made.name in AttentionInterface()
    made.close()
    made.close()
    assert made.name not in AttentionInterface()
    gone = weakref.ref(cache)
    del cache, made
    gc.collect()
    assert gone() is None
