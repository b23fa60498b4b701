"""Rows with different adapters in one pass: each gets what its own adds, and no trace else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deployments.engines import lora
from deployments.engines.adapters import Adapter
from deployments.engines.lora import MANY, ROUND, STALE, LoraMixer, Slots

SIZES = {"q": (6, 4), "deep.up": (6, 9), "deep.down": (9, 6)}


class Model(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(6, 4)
        self.deep = nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)})
        self.double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.deep["up"](x)
        return self.q(x), hidden, self.deep["down"](hidden)

    def hooks(self) -> int:
        return sum(len(module._forward_hooks) for module in self.modules())


def adapter(seed: int, rank: int, layers: tuple[str, ...]) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for i, name in enumerate(layers):
        inputs, outputs = SIZES[name]
        own = max(1, rank - i)  # not every layer has the largest
        a = torch.randn(own, inputs, generator=draw, dtype=torch.float64)
        weights[name] = a, torch.randn(own, outputs, generator=draw, dtype=torch.float64)
    return Adapter(name=str(seed), rank=rank, bytes=0, weights=weights)


ADAPTERS = [
    adapter(1, 1, ("q",)),
    adapter(2, ROUND, ("deep.up", "q")),
    adapter(3, ROUND + 1, tuple(SIZES)),
    adapter(4, 3 * ROUND, ("deep.down",)),
    adapter(5, 5, tuple(SIZES)),
]


def expected(model: Model, x: torch.Tensor, owners: list[Adapter | None]) -> list[torch.Tensor]:
    """One row after the other, with merged weights."""
    rows = []
    for row, owner in zip(x, owners, strict=True):

        def layer(name: str, given: torch.Tensor, owner: Adapter | None = owner) -> torch.Tensor:
            plain = model.get_submodule(name)
            assert isinstance(plain, nn.Linear)
            weight = plain.weight
            if owner is not None and name in owner.weights:
                a, b = owner.weights[name]
                weight = weight + b.T @ a
            return weight @ given + plain.bias

        hidden = layer("deep.up", row)
        rows.append((layer("q", row), hidden, layer("deep.down", hidden)))
    return [torch.stack(column)[None] for column in zip(*rows, strict=True)]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def check(
    model: Model,
    mixer: LoraMixer,
    single: list[Adapter | None],
    several: list[tuple[int, Adapter | None]],
) -> None:
    """``several``: lengths of runs."""
    owners = list(single)
    runs = []
    for length, owner in several:
        if owner is not None:
            runs.append((slice(len(owners), len(owners) + length), owner))
        owners += [owner] * length
    if not owners:
        return
    x = torch.randn(1, len(owners), 6, dtype=torch.float64)
    order = mixer.begin(single, runs)
    if order is not None:
        assert sorted(order) == list(range(len(single)))
        owners[: len(single)] = [single[row] for row in order]
    touched = {name for owner in owners if owner is not None for name in owner.weights}
    assert model.hooks() == len(touched)
    for got, right in zip(model(x), expected(model, x[0], owners), strict=True):
        assert torch.allclose(got, right, rtol=0, atol=1e-10)


choice = st.sampled_from([None, *ADAPTERS])
steps = st.tuples(
    st.lists(choice, max_size=3 * MANY), st.lists(st.tuples(st.integers(2, 5), choice), max_size=3)
)


@settings(max_examples=60)
@given(st.lists(steps, min_size=1, max_size=8))
def test_any_mixture_after_any_other(
    passes: list[tuple[list[Adapter | None], list[tuple[int, Adapter | None]]]],
) -> None:
    with torch.inference_mode():
        model = Model()
        mixer = LoraMixer(model, torch.device("cpu"))
        for single, several in passes:
            check(model, mixer, single, several)


def test_without_adapters_nothing_is_left() -> None:
    model = Model()
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    plain = model(x)
    mixer = LoraMixer(model, torch.device("cpu"))
    mixer.begin([ADAPTERS[2], None, ADAPTERS[0]])
    assert not torch.equal(model(x)[0], plain[0])
    mixer.begin([None, None, None])
    assert model.hooks() == 0
    assert all(torch.equal(a, b) for a, b in zip(model(x), plain, strict=True))


@pytest.mark.parametrize("others", [1, 2], ids=["in order", "gathered and filled up"])
def test_what_overflows_in_one_row_does_not_reach_another(others: int) -> None:
    huge = {"q": tuple(t * 1e200 for t in ADAPTERS[4].weights["q"])}
    loud = Adapter(name="loud", rank=5, bytes=0, weights=huge)  # type: ignore[arg-type]
    model = Model()
    mixer = LoraMixer(model, torch.device("cpu"))
    owners: list[Adapter | None] = [loud, *others * [ADAPTERS[0]], None]
    x = torch.randn(1, len(owners), 6, dtype=torch.float64) * 1e150
    order = mixer.begin(owners)
    assert (order is not None) == (others == 1)
    order = order or range(len(owners))
    q = model(x)[0][0]
    right = expected(model, x[0], [None if owners[i] is loud else owners[i] for i in order])[0][0]
    for row, i in enumerate(order):
        if owners[i] is loud:
            assert not q[row].isfinite().any()
        else:
            assert torch.allclose(q[row], right[row], rtol=1e-12)


def test_a_failure_while_stacking_leaves_nothing_half_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model()
    mixer = LoraMixer(model, torch.device("cpu"))
    check(model, mixer, [ADAPTERS[2]], [])

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(lora._Stack, "write", fail)
        with pytest.raises(MemoryError):
            mixer.begin([ADAPTERS[1], ADAPTERS[3]])
    assert model.hooks() == 0
    check(model, mixer, [ADAPTERS[1], ADAPTERS[2], ADAPTERS[3]], [])


@given(st.lists(st.lists(st.integers(1, 9), unique=True, max_size=6), min_size=1, max_size=12))
def test_slots(batches: list[list[int]]) -> None:
    """A stack that is moved and written as told always holds what is needed, and little else."""
    slots = Slots()
    stack: list[int] = []
    for batch in batches:
        before = len(stack)
        moves, writes = slots.place(batch)
        stack += [0] * (len(slots.owners) - len(stack))
        for source, target in moves:
            assert target < source < before
            stack[target] = stack[source]
        for number, slot in writes.items():
            stack[slot] = number
        del stack[len(slots.owners) :]
        assert stack == slots.owners
        assert len(set(stack)) == len(stack)
        assert set(batch) <= set(stack)
        assert len(set(stack) - set(batch)) <= STALE * len(stack)
