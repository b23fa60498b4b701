"""Different LoRA adapters in one forward pass: each row of the step gets its own, none is merged.

A layer's adapters add ``x Aᵀ B`` to its output (Hu et al., 2021). As in Punica (Chen et al.,
2023) and S-LoRA (Sheng et al., 2023), the rows that decode are gathered by adapter and share
two batched products a layer, whatever adapters they have. Theirs gather weights for each row;
on a processor reading weights is what costs, so here those of the running adapters lie side by
side in a stack, and each group's are read once. Where groups are equal the pass is ordered by
adapter, and no layer has to gather. Chunks of prompts, and adapters with many rows, are
multiplied alone. Where no row has an adapter the hooks are taken off: nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from deployments.engines.adapters import Adapter
from deployments.engines.lora_file import Target

ROUND = 8
"""Ranks are filled up with zeros to a multiple of it; those that are then equal share a stack."""
MANY = 8
"""Rows that decode with one adapter, above which it is multiplied alone: up to there a group costs
what reading its weights costs, and the largest group decides what all of them take."""
STALE = 1 / 4
"""Share of a stack that may belong to adapters which have left the batch: they may come back."""


@contextmanager
def observed_targets(model: PreTrainedModel) -> Iterator[dict[str, Target]]:
    """Learn from the forward passes in the block which layers can be adapted.

    Yields a dictionary that is filled when the block ends: linear layers that every pass called
    once, with all its tokens. Experts see some of them, and so does the head, which PEFT would
    adapt as well.
    """
    passes: list[tuple[int, ...]] = []
    calls: dict[nn.Module, list[tuple[int, ...]]] = {}

    def begin(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        passes.append(tuple(given["input_ids"].shape))

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        calls.setdefault(module, []).append(tuple(given[0].shape) if given else ())

    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    hooks = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [module.register_forward_pre_hook(note) for module in linears.values()]
    targets: dict[str, Target] = {}
    try:
        yield targets
    finally:
        for handle in hooks:
            handle.remove()
    for name, module in linears.items():
        target = Target(inputs=module.in_features, outputs=module.out_features)
        if calls.get(module) == [(*shape, target.inputs) for shape in passes]:
            targets[name] = target


class Slots:
    """Which adapter owns which place of a stack, by number. Decides; holds no weights."""

    def __init__(self) -> None:
        self.owners: list[int] = []

    def place(self, needed: Collection[int]) -> tuple[list[tuple[int, int]], dict[int, int]]:
        """Make sure that each of ``needed`` has a slot.

        Adapters that are needed no longer keep theirs until somebody new comes or they are too
        many; then the slots become dense.

        Returns:
            slots to move, as ``(source, target)``, first; and slots to write, by number.
        """
        missing = [number for number in needed if number not in self.owners]
        holes = [slot for slot, owner in enumerate(self.owners) if owner not in needed]
        if not missing and len(holes) <= STALE * len(self.owners):
            return [], {}
        writes: dict[int, int] = {}
        for number in missing:
            if holes:
                slot = holes.pop(0)
                self.owners[slot] = number
            else:
                slot = len(self.owners)
                self.owners.append(number)
            writes[number] = slot
        moves: list[tuple[int, int]] = []
        while holes:  # the highest moves down, unless it is a hole itself
            owner = self.owners.pop()
            if len(self.owners) == holes[-1]:
                holes.pop()
            else:
                target = holes.pop(0)
                self.owners[target] = owner
                moves.append((len(self.owners), target))
        return moves, writes


class _Stack:
    """Weights of one layer's adapters of equal rank, side by side.

    Args:
        a, b: an adapter's, for their widths, dtype and device.
    """

    __slots__ = ("_a", "_b", "a", "b")

    def __init__(self, rank: int, slots: int, a: torch.Tensor, b: torch.Tensor) -> None:
        self._a = a.new_zeros(slots, rank, a.shape[1])
        self._b = b.new_zeros(slots, rank, b.shape[1])
        self.show(slots)

    def show(self, slots: int) -> None:
        """What the products run over: ``a [slots, rank, inputs]``, ``b [slots, rank, outputs]``."""
        self.a, self.b = self._a[:slots], self._b[:slots]

    def reserve(self, slots: int, used: int) -> None:
        """Room for ``slots``, of which the first ``used`` are kept."""
        if len(self._a) < slots:
            self._a, self._b = (_grown(stack, slots, used) for stack in (self._a, self._b))

    def move(self, source: int, target: int) -> None:
        self._a[target] = self._a[source]
        self._b[target] = self._b[source]

    def write(self, slot: int, pair: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """``None``: an adapter that leaves this layer as it is."""
        ranks = 0 if pair is None else len(pair[0])
        if pair is not None:
            self._a[slot, :ranks] = pair[0]
            self._b[slot, :ranks] = pair[1]
        self._a[slot, ranks:] = 0
        self._b[slot, ranks:] = 0


def _grown(stack: torch.Tensor, slots: int, used: int) -> torch.Tensor:
    room = max(slots, 2 * len(stack))  # what is never written takes no memory
    grown = stack.new_empty(room, *stack.shape[1:])
    grown[:used] = stack[:used]
    return grown


class _Sums:
    """Where the products of one width go: one buffer for all layers, which run one at a time.

    The row behind the last stays zero.
    """

    __slots__ = ("alone", "products", "rows", "stacked")

    def __init__(self, mix: _Mix, like: torch.Tensor) -> None:
        self.rows = like.new_zeros(mix.length + 1, like.shape[-1])
        self.products = self.rows[: mix.length]
        self.stacked = [self.rows[part].view(shape) for _, part, shape in mix.stacked]
        self.alone = [self.rows[part] for part, _ in mix.alone]


@dataclass(slots=True, kw_only=True)
class _Mix:
    """How rows that decode are picked by adapter, multiplied, and put back."""

    begin: int
    """First row of the pass that has an adapter."""
    length: int
    """Rows of the products."""
    pick: torch.Tensor | None = None
    """Row of the pass for each row of the products; groups are filled up with any. None: the
    products' rows are the pass's, from ``begin`` on, one to one."""
    back: torch.Tensor | None = None
    """Row of the products for each row from ``begin`` to the last that has an adapter; for one
    without, the row behind the last. None as for ``pick``."""
    stacked: Sequence[tuple[int, slice, tuple[int, int, int]]]
    """Rank, rows of the products, and their shape ``[slots, rows a slot, -1]``."""
    alone: Sequence[tuple[slice, Adapter]]
    """Rows of the products that share one adapter."""
    sums: dict[int, _Sums] = field(default_factory=dict)
    """By width."""
    _input: torch.Tensor | None = None
    _picked: torch.Tensor | None = None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, tokens, inputs]`` → ``[length, inputs]``; neighbours that are given the very same
        tensor share it.
        """
        if x is not self._input or self._picked is None:
            self._input = x  # held, so that no other tensor can take its identity
            rows = x[0]
            if self.pick is None:
                self._picked = rows.narrow(0, self.begin, self.length)
            else:
                self._picked = rows.index_select(0, self.pick)
        return self._picked

    def put_back(self, sums: _Sums) -> torch.Tensor:
        """``[rows from begin, outputs]``."""
        return sums.products if self.back is None else sums.rows.index_select(0, self.back)


Addition: TypeAlias = Callable[[torch.Tensor, torch.Tensor], None]
"""Adds to a layer's output ``[1, tokens, outputs]``, in place, what the adapters of the pass make
of its input ``[1, tokens, inputs]``. Layers that are given the same tensor share work."""


class _Layer:
    """The hook of one linear layer. There are hundreds of them, so each call counts."""

    __slots__ = ("mix", "name", "runs", "stacks")

    def __init__(self, name: str) -> None:
        self.name = name
        self.mix: _Mix | None = None
        self.runs: Sequence[tuple[slice, Adapter]] = ()
        self.stacks: dict[int, _Stack] = {}
        """By rank."""

    def __call__(self, _: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        self.add(given[0], out)

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """An ``Addition``."""
        if self.mix is not None:
            added = self._mixed(self.mix, x, out)
            every = len(added) == out.shape[1]
            (out if every else out.narrow(1, self.mix.begin, len(added))).add_(added)
        for rows, adapter in self.runs:
            pair = adapter.weights.get(self.name)
            if pair is not None:
                out[0, rows].addmm_(torch.mm(x[0, rows], pair[0].T), pair[1])

    def _mixed(self, mix: _Mix, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``[rows from mix.begin, outputs]``."""
        width = out.shape[2]
        sums = mix.sums.get(width)
        if sums is None:
            sums = mix.sums[width] = _Sums(mix, out)
        picked = mix.gather(x)
        for (rank, part, shape), into in zip(mix.stacked, sums.stacked, strict=True):
            stack = self.stacks.get(rank)
            if stack is None:
                into.zero_()
            else:
                # A first: the larger operand is walked as it lies in memory
                inner = torch.bmm(stack.a, picked[part].view(shape).transpose(1, 2))
                torch.bmm(inner.transpose(1, 2), stack.b, out=into)
        for (part, adapter), into in zip(mix.alone, sums.alone, strict=True):
            pair = adapter.weights.get(self.name)
            if pair is None:
                into.zero_()
            else:
                torch.mm(torch.mm(picked[part], pair[0].T), pair[1], out=into)
        return mix.put_back(sums)


class LoraMixer:
    """Adds to the linear layers of one model what the adapters of a pass's rows contribute.

    The thread that runs the model calls ``begin`` before each pass. What the stacks take in
    memory is bounded by the adapters that ran together.

    Args:
        model: whose layers adapters name.
        device: of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._slots: dict[int, Slots] = {}
        """By rank."""
        self._layers: dict[str, _Layer] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._last: tuple[object, ...] = ((),)
        self._order: Sequence[int] | None = None

    def begin(
        self,
        single: Sequence[Adapter | None],
        several: Sequence[tuple[slice, Adapter]] = (),
    ) -> Sequence[int] | None:
        """Of the pass that follows: the adapters of its first rows, one a row, and of runs of
        further rows that share one.

        Returns:
            the order that the first rows must be given in, as indices of ``single``; None: as
            they are.
        """
        numbers = tuple(adapter.number if adapter is not None else 0 for adapter in single)
        if not any(numbers):
            numbers = ()
        now = (numbers, *several)
        if now == self._last:
            return self._order
        self._last = ()  # should this fail half-way, nothing of it is taken for granted
        groups: dict[Adapter, list[int]] = {}
        for row, adapter in enumerate(single):
            if adapter is not None:
                groups.setdefault(adapter, []).append(row)
        mix, self._order = self._mix(groups, len(single)) if groups else (None, None)
        self._attach({*groups, *(adapter for _, adapter in several)})
        for name in self._hooks:
            self._layers[name].mix = mix
            self._layers[name].runs = several
        self._last = now
        return self._order

    @property
    def additions(self) -> Mapping[str, Addition]:
        """Of the pass, by the layer's name; for who computes without the model's modules."""
        return {name: self._layers[name].add for name in self._hooks}

    def _mix(
        self, groups: Mapping[Adapter, Sequence[int]], rows_of_pass: int
    ) -> tuple[_Mix, Sequence[int] | None]:
        """From rows by adapter; brings the weights of small groups into the stacks.

        Returns:
            also the order in which the rows are expected.
        """
        pick: list[int] = []
        place: dict[int, int] = {}
        """Row of the pass → row of the products."""

        def take(rows: Sequence[int], length: int) -> slice:
            begin = len(pick)
            place.update(zip(rows, range(begin, begin + len(rows)), strict=True))
            pick.extend([*rows, *([0] * (length - len(rows)))])
            return slice(begin, len(pick))

        stacked: list[tuple[int, slice, tuple[int, int, int]]] = []
        alone: list[tuple[slice, Adapter]] = []
        by_rank: dict[int, dict[int, Adapter]] = {}
        for adapter, rows in groups.items():
            if len(rows) > MANY:
                alone.append((take(rows, len(rows)), adapter))
            else:
                rank = -(-adapter.rank // ROUND) * ROUND
                by_rank.setdefault(rank, {})[adapter.number] = adapter
        for rank, adapters in by_rank.items():
            owners = self._stack(rank, adapters)
            most = max(len(groups[adapter]) for adapter in adapters.values())
            begin = len(pick)
            for owner in owners:
                take(groups[adapters[owner]] if owner in adapters else (), most)
            stacked.append((rank, slice(begin, len(pick)), (len(owners), most, -1)))
        mix = _Mix(begin=0, length=len(pick), stacked=stacked, alone=alone)
        if len(place) == len(pick):  # no group was filled up: the pass may have their order
            return mix, [*pick, *(row for row in range(rows_of_pass) if row not in place)]
        mix.begin = min(place)
        back = [place.get(row, len(pick)) for row in range(mix.begin, max(place) + 1)]
        mix.pick = torch.tensor(pick, device=self._device)
        mix.back = torch.tensor(back, device=self._device)
        return mix, None

    def _stack(self, rank: int, adapters: Mapping[int, Adapter]) -> Sequence[int]:
        """Bring the weights of these into the stacks of ``rank``; returns the slots' owners."""
        slots = self._slots.setdefault(rank, Slots())
        before = len(slots.owners)
        moves, writes = slots.place(adapters.keys())
        after = len(slots.owners)
        if not writes and before == after:
            return slots.owners
        most = max(before, after)
        try:
            for number in writes:
                for name, pair in adapters[number].weights.items():
                    stacks = self._layer(name).stacks
                    if rank not in stacks:
                        stacks[rank] = _Stack(rank, most, *pair)
            for layer in self._layers.values():
                stack = layer.stacks.get(rank)
                if stack is None:
                    continue
                stack.reserve(most, before)
                for source, target in moves:
                    stack.move(source, target)
                for number, slot in writes.items():
                    stack.write(slot, adapters[number].weights.get(layer.name))
                stack.show(after)
        except BaseException:  # the slots would tell of weights that are not there
            self._attach(())
            self._slots, self._layers = {}, {}
            raise
        return slots.owners

    def _attach(self, adapters: Iterable[Adapter]) -> None:
        """Hooks where these have weights, and nowhere else."""
        wanted = {name for adapter in adapters for name in adapter.weights}
        for name in self._hooks.keys() - wanted:
            self._hooks.pop(name).remove()
        for name in wanted - self._hooks.keys():
            module = self._model.get_submodule(name)
            self._hooks[name] = module.register_forward_hook(self._layer(name))

    def _layer(self, name: str) -> _Layer:
        if name not in self._layers:
            self._layers[name] = _Layer(name)
        return self._layers[name]
