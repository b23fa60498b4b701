"""Different LoRA adapters in one forward pass: each row of the step gets its own, none is merged.

A layer's adapters add ``x Aᵀ B`` to its output (Hu et al., 2021). As in Punica (Chen et al.,
2023) and S-LoRA (Sheng et al., 2023), all rows that decode share two products a layer,
whatever adapters they have; ranks of different size live side by side in pages, as there in
S-LoRA's unified memory. Here the weights of all adapters of the batch are stacked along the
rank: one product gives every row's features for every adapter, those that are not its own are
set to zero, and the second product adds what is left. For the few rows that decode, this costs
about what it costs to read the weights once, and a processor multiplies large matrices better
than many small ones. Chunks of prompts, which have many rows of one adapter each, are
multiplied with that adapter alone.

A pass without adapters has no trace of any of this: the hooks are taken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

PAGE = 8
"""Ranks that are placed together."""
STALE = 1 / 4
"""Share of the pages that may belong to adapters which have left the batch: they may come back."""


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
    inputs, outputs = module.weight.shape
    return Target(inputs=inputs, outputs=outputs)


class Pages:
    """Which adapter owns which page of the stack, by number. Decides; holds no weights."""

    def __init__(self) -> None:
        self.owners: list[int | None] = []

    def place(
        self, needed: Mapping[int, int]
    ) -> tuple[list[tuple[int, int]], dict[int, list[int]]]:
        """Make sure that each adapter of ``needed`` (number → pages) has its pages.

        Pages stay dense from 0 on but for adapters that are no longer needed, which keep theirs
        until somebody new comes or they are too many.

        Returns:
            pages to move, as ``(source, target)`` in order, first; and the pages to write, by
            number, in the order of the adapter's ranks.
        """
        here = {owner for owner in self.owners if owner is not None}
        missing = [number for number in needed if number not in here]
        stale = sum(owner not in needed for owner in self.owners)
        if not missing and stale <= STALE * len(self.owners):
            return [], {}
        self.owners = [owner if owner in needed else None for owner in self.owners]
        free = [page for page, owner in enumerate(self.owners) if owner is None]
        free.reverse()
        writes: dict[int, list[int]] = {}
        for number in missing:
            writes[number] = []
            for _ in range(needed[number]):
                page = free.pop() if free else len(self.owners)
                if page == len(self.owners):
                    self.owners.append(number)
                else:
                    self.owners[page] = number
                writes[number].append(page)
        return self._fill(), writes

    def _fill(self) -> list[tuple[int, int]]:
        """Move the highest pages into holes. What was just placed lies below every hole."""
        moves: list[tuple[int, int]] = []
        while None in self.owners:
            owner = self.owners.pop()
            if owner is not None:
                hole = self.owners.index(None)
                self.owners[hole] = owner
                moves.append((len(self.owners), hole))
        return moves


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a pass adds."""

    mixed: slice
    """Rows that decode, from the first that has an adapter to the last."""
    hidden: torch.Tensor | None
    """``[rows of mixed, ranks of the stack]``: True where a rank is another adapter's."""
    runs: Sequence[tuple[slice, Adapter]]
    """Rows with one adapter."""


_NOTHING = _Plan(mixed=slice(0, 0), hidden=None, runs=())


class _Layer:
    """The hook of one linear layer: its part of the stack, and the sum.

    Args:
        a, b: an adapter's, for their widths, dtype and device.
    """

    __slots__ = ("_a", "_b", "a", "b", "name", "plan")

    def __init__(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        self.name = name
        self.plan = _NOTHING
        self._a = a.new_empty(0, a.shape[1])
        self._b = b.new_empty(0, b.shape[1])
        self.show(0)

    def __call__(self, _: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Add to ``out [1, tokens, outputs]`` in place."""
        plan, x, y = self.plan, given[0][0], out[0]
        if plan.hidden is not None:
            features = torch.mm(x[plan.mixed], self.a)
            # Not a product with zeros: what overflows in another adapter's ranks would be a NaN.
            y[plan.mixed].addmm_(features.masked_fill_(plan.hidden, 0.0), self.b)
        for rows, adapter in plan.runs:
            pair = adapter.weights.get(self.name)
            if pair is not None:
                y[rows].addmm_(torch.mm(x[rows], pair[0].T), pair[1])

    def show(self, ranks: int) -> None:
        """What the products run over: ``a [inputs, ranks]`` and ``b [ranks, outputs]``."""
        self.a, self.b = self._a[:ranks].T, self._b[:ranks]

    def reserve(self, ranks: int, used: int) -> None:
        """Room for ``ranks``, of which the first ``used`` are kept; zero, if there were none."""
        if len(self._a) < ranks:
            self._a, self._b = (_grown(stack, ranks, used) for stack in (self._a, self._b))

    def move(self, source: int, target: int) -> None:
        for stack in (self._a, self._b):
            stack[target * PAGE : (target + 1) * PAGE] = stack[source * PAGE : (source + 1) * PAGE]

    def write(self, pages: Sequence[int], pair: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        for i, page in enumerate(pages):
            for side, stack in enumerate((self._a, self._b)):
                place = stack[page * PAGE : (page + 1) * PAGE]
                ranks = pair[side][i * PAGE : (i + 1) * PAGE] if pair is not None else ()
                if len(ranks) < PAGE:
                    place.zero_()
                if len(ranks):
                    place[: len(ranks)] = ranks


def _grown(stack: torch.Tensor, ranks: int, used: int) -> torch.Tensor:
    room = max(ranks, 2 * len(stack))  # what is never written takes no memory
    grown = stack.new_empty(room, stack.shape[1])
    if len(stack):
        grown[:used] = stack[:used]
    else:
        grown[:used] = 0
    return grown


class LoraMixer:
    """Adds to the linear layers of one model what the adapters of a pass's rows contribute.

    The thread that runs the model calls ``begin`` before each pass. What the stack takes in
    memory is bounded by the adapters that ran together.

    Args:
        model: whose layers adapters name.
        like: has the dtype and device of the weights.
    """

    def __init__(self, model: nn.Module, like: torch.Tensor) -> None:
        self._model = model
        self._like = like
        self._pages = Pages()
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
        mixed = {adapter.number: adapter for adapter in single if adapter is not None}
        rows, hidden = slice(0, 0), None
        if mixed:
            self._stack(mixed)
            adapted = [row for row, number in enumerate(numbers) if number]
            rows = slice(adapted[0], adapted[-1] + 1)
            hidden = self._hidden(numbers[rows])
        plan = _Plan(mixed=rows, hidden=hidden, runs=several)
        self._attach({*mixed.values(), *(adapter for _, adapter in several)})
        for name in self._hooks:
            self._layers[name].plan = plan
        self._last = now

    def _stack(self, adapters: Mapping[int, Adapter]) -> None:
        """Bring the weights of these into the stack."""
        before = len(self._pages.owners)
        needed = {number: -(-adapter.rank // PAGE) for number, adapter in adapters.items()}
        moves, writes = self._pages.place(needed)
        after = len(self._pages.owners)
        if not writes and before == after:
            return
        try:
            for number in writes:
                for name, pair in adapters[number].weights.items():
                    self._layer(name, pair, before)
            for layer in self._layers.values():
                layer.reserve(max(before, after) * PAGE, before * PAGE)
                for source, target in moves:
                    layer.move(source, target)
                for number, pages in writes.items():
                    layer.write(pages, adapters[number].weights.get(layer.name))
                layer.show(after * PAGE)
        except BaseException:  # the pages would tell of weights that are not there
            self._attach(())
            self._pages, self._layers = Pages(), {}
            raise

    def _hidden(self, numbers: Sequence[int]) -> torch.Tensor:
        owners = self._like.new_tensor(self._pages.owners, dtype=torch.long)
        rows = self._like.new_tensor(numbers, dtype=torch.long)
        return rows[:, None] != owners.repeat_interleave(PAGE)

    def _attach(self, adapters: Iterable[Adapter]) -> None:
        """Hooks where these have weights, and nowhere else."""
        wanted = {name: pair for adapter in adapters for name, pair in adapter.weights.items()}
        for name in self._hooks.keys() - wanted.keys():
            self._hooks.pop(name).remove()
        for name in wanted.keys() - self._hooks.keys():
            layer = self._layer(name, wanted[name], len(self._pages.owners))
            self._hooks[name] = self._model.get_submodule(name).register_forward_hook(layer)

    def _layer(self, name: str, pair: tuple[torch.Tensor, torch.Tensor], pages: int) -> _Layer:
        """The hook of a layer, made with nothing in its part of the stack."""
        if name not in self._layers:
            layer = self._layers[name] = _Layer(name, *pair)
            layer.reserve(pages * PAGE, pages * PAGE)
            layer.show(pages * PAGE)
        return self._layers[name]
