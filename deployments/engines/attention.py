"""Attention of one packed row of tokens over the slots of the KV cache.

A forward pass is a single row: first one token each of the sequences that decode, then
the chunks of prompts. A model calls ``SlotAttention`` in place of its own attention
(transformers' ``AttentionInterface``); the decode tokens are answered by one batched
attention over a slice of the slots, each chunk by one over its own slot.

Queries that share a key head (grouped-query attention, Ainslie et al. 2023) are put side
by side, so that keys and values are read once and never repeated in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from deployments.engines.kv import SlotCache
from models import exotic_attention
from models.errors import ConfigError


class Span(Protocol):
    """Neighbouring tokens of the row that are answered together."""

    tokens: slice

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """``query [heads, tokens, dim]`` and a layer's cache → ``[tokens, heads, dim]``."""
        ...


class DecodeSpan:
    """One token each of several sequences, over slots ``0 … top``.

    Args:
        slots: of each token, in any order.
        positions: of each token; it sees the keys ``0 … position``.
    """

    def __init__(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        self.tokens = slice(0, len(slots))
        self._top = int(slots.max()) + 1
        self._length = int(positions.max()) + 1
        # Slots in between that do not decode take part with a query of zeros.
        in_place = torch.equal(slots, torch.arange(self._top, device=slots.device))
        self._rows = None if in_place else slots
        self._positions = positions.new_zeros(self._top).index_copy_(0, slots, positions)
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        heads, tokens, dim = query.shape
        kv_heads, value_dim = values.shape[2:]
        k = keys[: self._top, : self._length].transpose(1, 2)
        v = values[: self._top, : self._length].transpose(1, 2)
        q = query.transpose(0, 1).reshape(tokens, kv_heads, heads // kv_heads, dim)
        if self._rows is not None:
            q = q.new_zeros(self._top, *q.shape[1:]).index_copy_(0, self._rows, q)
        if window not in self._masks:
            mask = _mask(self._positions, self._length, window, query.dtype)
            self._masks[window] = mask[:, None, None, :]
        out = scaled_dot_product_attention(q, k, v, attn_mask=self._masks[window], scale=scaling)
        if self._rows is not None:
            out = out.index_select(0, self._rows)
        return out.reshape(tokens, heads, value_dim)


class PrefillSpan:
    """A chunk of one prompt, over everything before it in its slot and itself, causally."""

    def __init__(self, tokens: slice, slot: int, positions: torch.Tensor) -> None:
        self.tokens = tokens
        self._slot = slot
        self._positions = positions
        self._length = int(positions[-1]) + 1
        self._masks: dict[tuple[int | None, int], torch.Tensor] = {}

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        heads, tokens, dim = query.shape
        kv_heads, value_dim = values.shape[2:]
        group = heads // kv_heads
        k = keys[None, self._slot, : self._length].transpose(1, 2)
        v = values[None, self._slot, : self._length].transpose(1, 2)
        q = query.reshape(1, kv_heads, group * tokens, dim)
        if (window, group) not in self._masks:
            mask = _mask(self._positions, self._length, window, query.dtype)
            self._masks[window, group] = mask.repeat(group, 1)[None, None]
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=self._masks[window, group], scale=scaling
        )
        return out.reshape(heads, tokens, value_dim).transpose(0, 1)


def _mask(
    positions: torch.Tensor, length: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """``[queries, length]``: 0 where a query may look, -inf elsewhere."""
    keys = torch.arange(length, device=positions.device)
    hidden = keys > positions[:, None]
    if window is not None:
        hidden |= keys <= positions[:, None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(
        hidden, float("-inf")
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """What a layer asks of attention."""

    layer: int
    query: torch.Tensor
    """``[heads, tokens, dim]``."""
    scaling: float | None
    window: int | None


class SlotAttention:
    """The attention function of one runner, registered under a name of its own."""

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self._spans: list[Span] = []
        self.observe: Callable[[Asked], None] | None = None
        """Told what the model's own layers ask."""
        self.name = f"frontier_slots_{id(self):x}"
        AttentionInterface.register(self.name, self)

    def begin(self, spans: list[Span]) -> None:
        """The spans of the forward pass that follows; together they cover its row."""
        self._spans = spans

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``query [1, heads, tokens, dim]`` → ``[1, tokens, heads, dim]``.

        ``key`` and ``value`` are this pass's alone and lie in the cache already.
        """
        if (name := exotic_attention.asked_for(kwargs)) is not None:
            raise ConfigError(
                f"{type(module).__name__} uses attention with '{name}', which the"
                " embedded engine does not compute; serve this model with another engine."
            )
        layer = module.layer_idx
        assert isinstance(layer, int)
        if self.observe is not None:
            self.observe(Asked(layer, query[0], scaling, sliding_window))
        _, heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, self._cache.values[layer].shape[-1])
        self.attend(layer, query[0], out[0], scaling, sliding_window)
        return out, None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        out: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> None:
        """``query [heads, tokens, dim]`` → ``out [tokens, heads, dim]``; keys and values lie in the
        cache already.
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for span in self._spans:
            out[span.tokens] = span.attend(query[:, span.tokens], keys, values, scaling, window)

    def close(self) -> None:
        """Unregister; the model cannot run afterwards."""
        AttentionInterface._global_mapping.pop(self.name, None)
