"""Every unit once an epoch, nothing too long, and a pure function of the step."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from train.recipes.llm.packing import Schedule, groups, pack

lengths_ = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(lengths=lengths_, limit=st.integers(8, 40))
def test_each_unit_is_packed_once_within_the_limit(lengths: list[int], limit: int) -> None:
    packed = pack(range(len(lengths)), lengths, limit)
    assert sorted(i for units in packed for i in units) == list(range(len(lengths)))
    for units in packed:
        assert sum(lengths[i] for i in units) <= limit or len(units) == 1


@given(
    lengths=lengths_,
    batch=st.integers(1, 7),
    packing=st.booleans(),
    seed=st.integers(0, 3),
    start=st.integers(0, 30),
)
def test_a_resumed_run_sees_what_an_undisturbed_one_would(
    lengths: list[int], batch: int, packing: bool, seed: int, start: int
) -> None:
    def fresh() -> Schedule:
        return Schedule(lengths, limit=40, batch=batch, packing=packing, seed=seed)

    undisturbed = fresh()
    steps = [undisturbed.step(n) for n in range(start + 5)]
    resumed = fresh()
    assert [resumed.step(n) for n in range(start, start + 5)] == steps[start:]
    assert all(len(step) == batch for step in steps)


@given(lengths=lengths_, batch=st.integers(1, 7), epochs=st.integers(1, 4))
def test_epochs_cover_every_unit_and_are_shuffled_anew(
    lengths: list[int], batch: int, epochs: int
) -> None:
    schedule = Schedule(lengths, limit=40, batch=batch, packing=True, seed=0)
    total = schedule.steps_of(epochs)
    seen = Counter(i for n in range(total) for units in schedule.step(n) for i in units)
    assert min(seen[i] for i in range(len(lengths))) >= epochs
    assert schedule.epochs_before(total) >= epochs
    assert schedule.epochs_before(total - 1) < epochs


def test_seeds_and_epochs_give_other_orders() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return Schedule([10] * 50, limit=40, batch=1, packing=True, seed=seed).epoch(epoch)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_packing_wastes_little() -> None:
    lengths = [(37 * i) % 200 + 10 for i in range(500)]
    packed = pack(range(500), lengths, 512)
    assert sum(lengths) / (512 * len(packed)) > 0.93


def test_groups_do_not_depend_on_who_runs_them() -> None:
    batch = [(i,) for i in range(8)]
    assert groups(batch, 2) == [[(0,), (1,)], [(2,), (3,)], [(4,), (5,)], [(6,), (7,)]]
