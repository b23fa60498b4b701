"""The KV cache: one contiguous slot a sequence, for every layer of any Hugging Face model.

Ownership
---------
::

    layer 0   keys    [slots, context, kv_heads, head_dim]
              values  [slots, context, kv_heads, head_dim]
                 slot 3 ───► tokens 0 … computed-1 of the sequence that owns slot 3
              behind the slots: blocks of tokens that are kept (``prefixes.py``)
    layer 1   …

The scheduler owns the map from sequences to slots; this file owns the bytes. A model's own
attention layers write here through ``Cache.update`` and read in ``attention.py``. Layers
are allocated at their first write, so no model needs a line of its own. Pages that no
token has reached are never touched and take no memory.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import torch
from transformers import Cache

from deployments.engines.prefixes import BLOCK
from deployments.engines.sequence import Copy, Load, Move, Save


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """A transformers ``Cache`` whose batch is one row of tokens from many sequences.

    Before a forward pass the runner says by ``place`` where each token belongs.
    """

    def __init__(self, *, slots: int, context: int, blocks: int = 0) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self._context = context
        self._lines = slots + math.ceil(blocks * BLOCK / context)
        self.places = torch.empty(0, dtype=torch.long)
        """Of each token of the pass, ``slot · context + position``."""
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def place(self, rows: torch.Tensor) -> None:
        """``rows[t] = slot · context + position`` of the pass's token ``t``."""
        self.places = rows

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[1, kv_heads, tokens, head_dim]`` of this pass; hands them back unchanged."""
        if layer_idx not in self.keys:
            self.keys[layer_idx] = self._allocate(key_states)
            self.values[layer_idx] = self._allocate(value_states)
        for cache, states in ((self.keys, key_states), (self.values, value_states)):
            cache[layer_idx].flatten(0, 1).index_copy_(0, self.places, states[0].transpose(0, 1))
        return key_states, value_states

    def move(self, moves: Sequence[Move]) -> None:
        """Copies and loads in their order; loads that follow one another are made at once."""
        for kind, some in groupby(moves, type):
            if kind is Load:
                self.load([move for move in some if isinstance(move, Load)])
            else:
                for move in some:
                    assert isinstance(move, Copy)
                    self.copy(move.source, move.target, move.length)
                    if move.wipe:
                        self.wipe(move.source, move.length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a slot, in all layers."""
        for tensors in (self.keys, self.values):
            for layer in tensors.values():
                layer[target, :length].copy_(layer[source, :length])

    def load(self, loads: Sequence[Load]) -> None:
        """Blocks into slots, in all layers."""
        rows: dict[int, int] = {}
        for load in loads:
            rows.update(zip(self._part(load.target, 0), self._rows_of(load.blocks), strict=False))
        self._move(rows)

    def save(self, saves: Sequence[Save]) -> None:
        """Parts of slots into blocks, in all layers. Of two that want a block, the last has it."""
        rows: dict[int, int] = {}
        for save in saves:
            rows.update(
                zip(self._rows_of(save.blocks), self._part(save.slot, save.start), strict=False)
            )
        self._move(rows)

    def _rows_of(self, blocks: Sequence[int]) -> Iterator[int]:
        behind = self.slots * self._context
        for block in blocks:
            yield from range(behind + block * BLOCK, behind + (block + 1) * BLOCK)

    def _part(self, slot: int, start: int) -> range:
        return range(slot * self._context + start, (slot + 1) * self._context)

    def _move(self, rows: Mapping[int, int]) -> None:
        """In every layer, to each row (the key) what is in another."""
        if not rows:
            return
        device = next(iter(self.keys.values())).device
        target = torch.tensor([*rows], device=device)
        source = torch.tensor([*rows.values()], device=device)
        for tensors in (self.keys, self.values):
            for layer in tensors.values():
                lines = layer.flatten(0, 1)
                lines.index_copy_(0, target, lines.index_select(0, source))

    def wipe(self, slot: int, length: int) -> None:
        """Zero a slot's first tokens: a NaN would spoil the next owner through masked positions."""
        for tensors in (self.keys, self.values):
            for layer in tensors.values():
                layer[slot, :length].zero_()

    @property
    def reserved_bytes(self) -> int:
        """What the slots take once every position has been used."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: the runner passes positions explicitly."""
        return 0

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        _, heads, _, head_dim = states.shape
        shape = (self._lines, self._context, heads, head_dim)
        if states.device.type == "cpu":
            # The kernel gives such pages one by one as they are written; torch.zeros would
            # write all, and numpy asks for huge ones, of which a few tokens fill none. Private,
            # because of a shared mapping (mmap's default) reading takes memory as well, and
            # short sequences beside a long one are read as far as that one goes.
            pages = mmap.mmap(
                -1,
                math.prod(shape) * states.element_size(),
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            )
            # Debian's kernel gives huge ones unasked; and what people wrote is no part of a
            # crash's core file, nor are the gigabytes.
            for advice in ("MADV_DONTDUMP", "MADV_NOHUGEPAGE"):
                if (number := getattr(mmap, advice, None)) is not None:
                    with suppress(OSError):  # a kernel without huge pages cannot be told not to
                        pages.madvise(number)
            return torch.frombuffer(pages, dtype=states.dtype).view(shape)
        return torch.zeros(shape, dtype=states.dtype, device=states.device)
