"""Linear layers for the CPU: weights packed once into oneDNN's blocked layout.

``torch.nn.functional.linear`` repacks or walks the plain layout at every call. With the
weight packed beforehand the same product, in the same precision, takes about half the
time, and layers that are given the very same tensor (query, key and value; gate and up) are
computed as one (``python -m benchmarks.linears`` measures both). The operator is the one
that TorchInductor emits for frozen weights.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_log = logging.getLogger(__name__)

PACK_ROWS = 32
"""Rows the layout is tuned for; it is right for any number of rows."""

TOLERANCE = 1e-4
"""Largest accepted difference of a model's outputs, relative to the largest of them."""

KEPT = 64
"""How many compiled products are kept."""

Make: TypeAlias = Callable[[Sequence[nn.Linear]], nn.Module]
"""What computes several layers over the same input, their outputs one after the other."""

Groups: TypeAlias = Sequence[Sequence[nn.Linear]]
"""Linear layers that were given the very same tensor, in the order of their calls."""


class PackedLinear(nn.Module):
    """``y = x Wᵀ + b`` with ``W`` packed; inference only."""

    def __init__(self, *linears: nn.Linear) -> None:
        """Several layers: their outputs one after the other."""
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        # Copies: one tensor left of a mapped weight file keeps all of it in memory.
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        self._bias = None
        if any(linear.bias is not None for linear in linears):
            self._bias = torch.cat([bias_of(linear) for linear in linears])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return out


class SharedLinear(nn.Module):
    """One of several layers over the same input: the first that is called computes them all.

    Right for any order of calls; only the speed counts on the one that was observed.
    """

    def __init__(self, group: _Group, index: int) -> None:
        super().__init__()
        self._group = group
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.output(self._index, x)

    @staticmethod
    def together(layers: Sequence[nn.Module]) -> nn.Module | None:
        """What computes just these, in this order; ``None``: nothing does."""
        group = layers[0]._group if isinstance(layers[0], SharedLinear) else None
        indices = [
            each._index
            for each in layers
            if isinstance(each, SharedLinear) and each._group is group
        ]
        if group is None or indices != list(range(group.size)):
            return None
        return group.packed


class _Group:
    """Outputs that wait for their layers, and the input that they belong to."""

    def __init__(self, linears: Sequence[nn.Linear], make: Make) -> None:
        self.packed = make(linears)
        self._sizes = [linear.out_features for linear in linears]
        self.size = len(linears)
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []
        self._waiting = 0

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if x is not self._input or self._outputs[index] is None:
            self._input = x  # held, so that no other tensor can take its identity
            self._outputs = list(self.packed(x).split(self._sizes, dim=-1))
            self._waiting = len(self._sizes)
        out = self._outputs[index]
        assert out is not None
        self._outputs[index] = None
        self._waiting -= 1
        if not self._waiting:
            self._input = None
        return out


def keep_few_compiled() -> None:
    """To be called before the first product.

    oneDNN compiles one for each shape, that is for each number of rows, and keeps 1024: at some
    half a megabyte, more than a small model's weights. A step has about five, and to compile one
    anew takes a millisecond.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's, its own
        os.environ.setdefault(name, str(KEPT))


def as_linear(model: nn.Module) -> None:
    """Exchange GPT-2's layers, whose weights lie the other way round, for such as all others have:
    they are packed, rounded and adapted like them.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Conv1D:
                conv: Any = child
                weight = conv.weight.detach().t().contiguous()
                outputs, inputs = weight.shape
                linear = nn.Linear(inputs, outputs, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
                setattr(parent, name, linear.train(child.training))


@contextmanager
def observed_groups(model: nn.Module) -> Iterator[Groups]:
    """Learn from a forward pass in the block which layers share their input.

    Yields a list that is filled when the block ends. Layers that the pass called more than
    once are left out: what they share may change from call to call.
    """
    calls: list[tuple[nn.Linear, torch.Tensor]] = []

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given and isinstance(module, nn.Linear):
            calls.append((module, given[0]))

    linears = {module for module in model.modules() if _packable(module)}
    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    groups: list[Sequence[nn.Linear]] = []
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    by_input: dict[int, list[nn.Linear]] = {}
    for linear, given in calls:
        by_input.setdefault(id(given), []).append(linear)
    called = Counter(linear for linear, _ in calls)
    groups += [
        group
        for group in by_input.values()
        if len(group) > 1 and all(called[linear] == 1 for linear in group)
    ]


def pack_if_equal(model: nn.Module, groups: Groups, probe: Callable[[], torch.Tensor]) -> int:
    """Pack the model's linear layers, unless it then fails or answers otherwise.

    Args:
        groups: layers to compute as one, from ``observed_groups``.
        probe: runs the model; deterministic.

    Returns:
        How many layers are packed.
    """
    before = probe()
    plain = pack_linears(model, groups)
    try:
        fits = relative_difference(probe(), before) <= TOLERANCE
    except Exception as error:  # a model may read weights past its layers' forward
        fits = False
        _log.warning("%s keeps its plain linear layers: %s", type(model).__name__, error)
    if not fits:
        put_back(plain)
        return 0
    return len(plain)


def put_back(replaced: Sequence[tuple[nn.Module, str, nn.Linear]]) -> None:
    for parent, name, child in replaced:
        setattr(parent, name, child)


def packed(linears: Sequence[nn.Linear]) -> nn.Module:
    return PackedLinear(*linears)


def pack_linears(
    model: nn.Module, groups: Groups = (), make: Make = packed
) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Replace every float32 ``nn.Linear`` on the CPU; others are left alone.

    Args:
        groups: layers to compute as one.
        make: what takes their place, and that of a layer alone.

    Returns:
        What was replaced: the module that held it, its name there, and the layer.
    """
    if not torch._C._has_mkldnn:
        return []
    shared: dict[nn.Module, nn.Module] = {}
    for linears in groups:
        group = _Group(linears, make)
        shared |= {linear: SharedLinear(group, i) for i, linear in enumerate(linears)}
    replaced = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _packable(child):
                assert isinstance(child, nn.Linear)
                setattr(parent, name, shared.get(child) or make([child]))
                replaced.append((parent, name, child))
    return replaced


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; NaN if there is one."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def _packable(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    )


def bias_of(linear: nn.Linear) -> torch.Tensor:
    """Zeros, if it has none."""
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features)
    return linear.bias.detach()
