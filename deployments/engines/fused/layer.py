"""A decoder layer by its structure, and what the layers of one forward pass share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import nn

from deployments.engines.fused import OtherStructure
from deployments.engines.int8 import Int8Linear
from deployments.engines.kernels import Floats, Places
from deployments.engines.linears import PackedLinear
from deployments.engines.lora import Addition

Linear = TypeVar("Linear", PackedLinear, Int8Linear)

Parts: TypeAlias = Mapping[str, tuple[nn.Module, slice]]
"""By the name of each of the model's own linear layers: the product it is a part of, and its
outputs there.
"""


@dataclass(frozen=True, slots=True)
class Norm:
    gain: Floats
    shift: Floats
    epsilon: float
    centred: bool
    """See ``kernels.normalise``."""

    @classmethod
    def of(cls, module: Any, epsilon: float, *, centred: bool) -> Norm:
        # A copy: one tensor left of a mapped weight file keeps all of it in memory.
        gain: Floats = module.weight.detach().numpy().copy()
        bias = getattr(module, "bias", None)
        shift = np.zeros_like(gain) if bias is None else bias.detach().numpy().copy()
        return cls(gain, shift, float(epsilon), centred)


@dataclass(frozen=True, slots=True)
class Layer(Generic[Linear]):
    attention_norm: Norm
    qkv: Linear
    keys: Floats
    """``[places, kv_heads, dim]``: the cache's own."""
    values: Floats
    scaling: float
    window: int | None
    out: Linear
    mlp_norm: Norm
    up: Linear
    """Of a gated one, gates and all."""
    gated: bool
    """See ``kernels.activate``."""
    down: Linear
    parts: Parts

    @property
    def shape(self) -> tuple[object, ...]:
        """Layers of one shape share the room to compute in."""
        linears: tuple[Linear, ...] = (self.qkv, self.out, self.up, self.down)
        return (*((each.in_features, each.out_features) for each in linears), self.keys.shape)

    @property
    def dim(self) -> int:
        """Of a head."""
        dim: int = self.keys.shape[-1]
        return dim


def product(kind: type[Linear], module: nn.Module | None) -> Linear:
    """Raises OtherStructure: it is not computed as ``kind``."""
    if not isinstance(module, kind):
        raise OtherStructure(f"its layers are not each a {kind.__name__}, qkv as one")
    return module


def cached(keys: torch.Tensor, values: torch.Tensor) -> tuple[Floats, Floats]:
    """Raises OtherStructure."""
    if keys.shape != values.shape:
        raise OtherStructure("its values have another size than its keys")
    return keys.flatten(0, 1).numpy(), values.flatten(0, 1).numpy()


def check_leaves(layer: nn.Module, expected: Collection[str]) -> None:
    """Raises OtherStructure: a layer has other modules."""
    leaves = {name for name, each in layer.named_modules() if not any(each.children())}
    if leaves != set(expected):
        raise OtherStructure(f"its layers have {sorted(leaves ^ set(expected))} more or less")


class Structure(Protocol):
    """A model of one kind. Making it of another kind raises AttributeError or TypeError."""

    modules: list[nn.Module]
    """Its layers."""
    norm: nn.Module
    """The last one."""

    def __init__(self, model: Any) -> None: ...

    def layer(
        self, kind: type[Linear], module: Any, keys: torch.Tensor, values: torch.Tensor
    ) -> Layer[Linear]:
        """Raises OtherStructure, too."""
        ...

    def embedded(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``[rows, width]``."""
        ...

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``x [rows, width]``, cosines and sines ``[rows, dim]`` by which queries and keys are
        turned.
        """
        ...

    def own_turn(self, named: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the model itself tells its layers, ``[1, rows, dim]``; ``None``: nothing is turned.

        Args:
            named: what a layer was called with.

        Raises OtherStructure: it is told in another way.
        """
        ...


class Pass:
    """Positions and places of one forward pass, and what goes into attention and comes out.

    Args:
        layer: any one; they are alike.
        cos: ``[rows, dim]``, as is ``sin``.
        places: ``[rows]``, in the cache.
    """

    def __init__(
        self, layer: Layer[Any], cos: torch.Tensor, sin: torch.Tensor, places: torch.Tensor
    ) -> None:
        rows = len(places)
        self.cos: Floats = cos.contiguous().numpy()
        self.sin: Floats = sin.contiguous().numpy()
        self.places: Places = places.numpy()
        query = torch.empty(rows, layer.out.in_features // layer.dim, layer.dim)
        self.turned: Floats = query.numpy()
        """``[rows, heads, dim]``, the queries where they are computed."""
        self.query = query.transpose(0, 1)
        """The same, as attention takes them."""
        self.attended = torch.empty_like(query)
        self.heads = self.attended.flatten(1)
        """The same, as the layers take them."""


Additions: TypeAlias = Mapping[nn.Module, Sequence[tuple[slice, Addition]]]
"""What adapters add to a product: some of its outputs, and how."""


class Arithmetic(Protocol):
    """Products of some rows, and what lies between them. ``x [rows, width]`` is changed in place.

    Made of any of the layers and the number of rows, for the room that computing takes.
    """

    def before_attention(self, layer: Layer[Any], x: Floats, shared: Pass) -> None:
        """The pass's queries, and keys and values in the cache."""
        ...

    def after_attention(self, layer: Layer[Any], x: Floats, shared: Pass) -> None:
        """To ``x`` what the heads have found."""
        ...

    def feed_forward(self, layer: Layer[Any], x: Floats) -> None:
        """To ``x`` what the layers behind attention make of it."""
        ...
