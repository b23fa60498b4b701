"""The bytes of the KV slots: written where they belong, copied, wiped, and not touched early."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.load import kv_cache
from deployments.engines.kv import SlotCache
from deployments.engines.sequence import Copy

SLOTS, CONTEXT, HEADS, DIM = 3, 10, 2, 4
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def states(tokens: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(1, HEADS, tokens, DIM).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_token_goes_to_its_place(dtype: torch.dtype) -> None:
    cache = SlotCache(slots=SLOTS, context=CONTEXT)
    places = [(2, 0), (0, 9), (1, 3), (1, 4)]
    cache.place(torch.tensor([slot * CONTEXT + at for slot, at in places]))
    written = {}
    for layer in (0, 5):
        key, value = states(4, dtype), states(4, dtype)
        got = cache.update(key, value, layer)
        assert got[0] is key
        assert got[1] is value
        written[layer] = key, value
    for layer, (key, value) in written.items():
        for tensor, given in ((cache.keys[layer], key), (cache.values[layer], value)):
            assert (tensor.dtype, tensor.shape) == (dtype, (SLOTS, CONTEXT, HEADS, DIM))
            for token, (slot, at) in enumerate(places):
                assert torch.equal(tensor[slot, at], given[0, :, token])
            tensor[tuple(torch.tensor(places).T)] = 0
            assert not tensor.any(), "nothing else was written"


def test_what_nobody_has_vouched_for_is_not_left_behind() -> None:
    for wipe in (True, False):
        cache = full()
        cache.move([Copy(source=2, target=0, length=7, wipe=wipe)])
        for tensor in (*cache.keys.values(), *cache.values.values()):
            assert bool(tensor[0, :7].any(dim=(1, 2)).all())
            assert bool(tensor[2, :7].any()) is not wipe
            assert tensor[2, 7:].any()


def full() -> SlotCache:
    cache = SlotCache(slots=SLOTS, context=CONTEXT)
    cache.place(torch.arange(SLOTS * CONTEXT))
    for layer in range(2):
        cache.update(states(SLOTS * CONTEXT), states(SLOTS * CONTEXT), layer)
    return cache


def test_a_copy_takes_the_leading_tokens_of_every_layer() -> None:
    cache = full()
    before = {id(t): t.clone() for d in (cache.keys, cache.values) for t in d.values()}
    cache.copy(0, 2, 7)
    for tensors in (cache.keys, cache.values):
        for tensor in tensors.values():
            old = before[id(tensor)]
            assert torch.equal(tensor[2, :7], old[0, :7])
            assert torch.equal(tensor[2, 7:], old[2, 7:])
            assert torch.equal(tensor[:2], old[:2])


def test_wiping_leaves_no_nan_and_touches_no_other_slot() -> None:
    cache = full()
    for tensors in (cache.keys, cache.values):
        for tensor in tensors.values():
            tensor[1, :6] = torch.nan
    cache.wipe(1, 6)
    for tensors in (cache.keys, cache.values):
        for tensor in tensors.values():
            assert not tensor[1, :6].any()
            assert tensor[1, 6:].all()
            assert tensor[0].all()
            assert tensor[2].all()


def test_reserved_bytes() -> None:
    assert SlotCache(slots=SLOTS, context=CONTEXT).reserved_bytes == 0
    assert full().reserved_bytes == 2 * 2 * SLOTS * CONTEXT * HEADS * DIM * 8


def test_positions_that_no_token_has_reached_take_no_memory() -> None:
    cache = SlotCache(slots=64, context=32_768)
    process = psutil.Process()
    before = process.memory_info().rss
    cache.place(torch.tensor([0, 1, 40_000]))
    cache.update(states(3, torch.float32), states(3, torch.float32), 0)
    assert cache.reserved_bytes == 2 * 64 * 32_768 * HEADS * DIM * 4  # 134 MB
    for tensor in (cache.keys[0], cache.values[0]):  # short sequences beside a long one are read
        assert tensor.sum() != 0
    assert process.memory_info().rss - before < 20_000_000


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this kernel has none"
)
def test_neither_huge_pages_nor_a_place_in_core_files() -> None:
    """By which a benchmark also tells the cache from the rest of a replica."""
    process = psutil.Process()
    resident, asked = kv_cache(process)
    cache = SlotCache(slots=4, context=32_768)
    cache.place(torch.tensor([0, 40_000]))
    cache.update(states(2, torch.float32), states(2, torch.float32), 0)
    now_resident, now_asked = kv_cache(process)
    assert now_asked - asked == cache.reserved_bytes
    assert 0 < now_resident - resident < 100_000, "a few pages"
