"""Different LoRA adapters in one forward pass: each row of the step gets its own, none is merged.

A layer's adapters add ``x Aᵀ B`` to its output (Hu et al., 2021). Punica (Chen et al., 2023) and
S-LoRA (Sheng et al., 2023) gather weights for each row; on a processor that is what costs, and
so is every small call. Here those of the running adapters lie side by side in a stack, as if
they were one adapter of a large rank. All rows that decode go through it in two plain products;
in between, what belongs to other rows' adapters is set to zero. That computes more than it must,
in calls that are few and of a size that processors are good at. Chunks of prompts are
multiplied alone. Where no row has an adapter the hooks are taken off: nothing is left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deployments.engines.adapters import Adapter
from deployments.engines.lora_file import Target

ROUND = 8
"""Ranks are filled up with zeros to a multiple of it; those that are then equal share a stack."""
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
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
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
        target = _target(module)
        if calls.get(module) == [(*shape, target.inputs) for shape in passes]:
            targets[name] = target


def _target(module: nn.Module) -> Target:
    if isinstance(module, nn.Linear):
        return Target(inputs=module.in_features, outputs=module.out_features)
    weight = module.weight  # Conv1D keeps it the other way round
    assert isinstance(weight, torch.Tensor)
    inputs, outputs = weight.shape
    return Target(inputs=inputs, outputs=outputs)


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
        """What is multiplied: ``a [inputs, slots x rank]``, ``b [slots x rank, outputs]``."""
        self.a, self.b = self._a[:slots].flatten(0, 1).T, self._b[:slots].flatten(0, 1)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mix:
    """Which rows that decode have adapters, and which columns of a stack are not theirs."""

    begin: int
    """First row of the pass that has an adapter."""
    rows: int
    """How many follow, up to the last one that has."""
    foreign: Sequence[tuple[int, torch.Tensor]]
    """Rank, and ``[rows, slots x rank]``: True where another row's adapter lies."""


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
        """Add to ``out [1, tokens, outputs]`` in place."""
        x, out = given[0][0], out[0]
        if (mix := self.mix) is not None:
            mixed, into = x.narrow(0, mix.begin, mix.rows), out.narrow(0, mix.begin, mix.rows)
            for rank, foreign in mix.foreign:
                if (stack := self.stacks.get(rank)) is not None:
                    low = torch.mm(mixed, stack.a).masked_fill_(foreign, 0)  # not 0 x infinity
                    into.addmm_(low, stack.b)
        for rows, adapter in self.runs:
            pair = adapter.weights.get(self.name)
            if pair is not None:
                out[rows].addmm_(torch.mm(x[rows], pair[0].T), pair[1])


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

    def begin(
        self,
        single: Sequence[Adapter | None],
        several: Sequence[tuple[slice, Adapter]] = (),
    ) -> None:
        """Of the pass that follows: the adapters of its first rows, one a row, and of runs of
        further rows that share one.
        """
        numbers = tuple(adapter.number if adapter is not None else 0 for adapter in single)
        if not any(numbers):
            numbers = ()
        now = (numbers, *several)
        if now == self._last:
            return
        self._last = ()  # should this fail half-way, nothing of it is taken for granted
        owners = {row: adapter for row, adapter in enumerate(single) if adapter is not None}
        mix = self._mix(owners) if owners else None
        self._attach({*owners.values(), *(adapter for _, adapter in several)})
        for name in self._hooks:
            self._layers[name].mix = mix
            self._layers[name].runs = several
        self._last = now

    def _mix(self, owners: Mapping[int, Adapter]) -> _Mix:
        """From adapters by row; brings their weights into the stacks."""
        by_rank: dict[int, dict[int, Adapter]] = {}
        for adapter in owners.values():
            rank = -(-adapter.rank // ROUND) * ROUND
            by_rank.setdefault(rank, {})[adapter.number] = adapter
        begin = min(owners)
        rows = max(owners) + 1 - begin
        foreign: list[tuple[int, torch.Tensor]] = []
        for rank, adapters in by_rank.items():
            place = {number: slot for slot, number in enumerate(self._stack(rank, adapters))}
            mask = torch.ones(rows, len(place), rank, dtype=torch.bool)
            for row, adapter in owners.items():
                if adapter.number in adapters:
                    mask[row - begin, place[adapter.number]] = False
            foreign.append((rank, mask.flatten(1).to(self._device)))
        return _Mix(begin=begin, rows=rows, foreign=foreign)

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
