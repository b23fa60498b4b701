"""A decoder layer by its structure, and what the layers of one forward pass share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn.functional import silu

from deployments.engines.fused import OtherStructure
from deployments.engines.int8 import Int8Linear
from deployments.engines.kernels import Floats, Places
from deployments.engines.linears import PackedLinear, SharedLinear
from deployments.engines.lora import Addition

Linear = TypeVar("Linear", PackedLinear, Int8Linear)

LEAVES = {
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.act_fn",
    "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Layer(Generic[Linear]):
    attention_gain: Floats
    """Of the norm before; in int8, of the product after as well."""
    attention_epsilon: float
    qkv: Linear
    keys: Floats
    """``[places, kv_heads, dim]``: the cache's own."""
    values: Floats
    scaling: float
    window: int | None
    out: Linear
    mlp_gain: Floats
    mlp_epsilon: float
    gate_up: Linear
    down: Linear

    @classmethod
    def of(
        cls, kind: type[Linear], layer: Any, keys: torch.Tensor, values: torch.Tensor
    ) -> Layer[Linear]:
        """Raises OtherStructure."""
        leaves = {name for name, each in layer.named_modules() if not any(each.children())}
        if leaves != LEAVES:
            raise OtherStructure(f"its layers have {sorted(leaves ^ LEAVES)} more or less")
        if keys.shape != values.shape:
            raise OtherStructure("its values have another size than its keys")

        def linear(module: nn.Module | None) -> Linear:
            if not isinstance(module, kind):
                raise OtherStructure(f"its layers are not each a {kind.__name__}, qkv as one")
            return module

        attention, mlp = layer.self_attn, layer.mlp
        some = torch.linspace(-8, 8, 65)
        if not torch.allclose(mlp.act_fn(some), silu(some)):
            raise OtherStructure("its gates are not SiLU's")
        qkv = linear(SharedLinear.together([attention.q_proj, attention.k_proj, attention.v_proj]))
        gate_up = linear(SharedLinear.together([mlp.gate_proj, mlp.up_proj]))
        before_attention, before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        return cls(
            attention_gain=_gain(before_attention, qkv),
            attention_epsilon=float(before_attention.variance_epsilon),
            qkv=qkv,
            keys=keys.flatten(0, 1).numpy(),
            values=values.flatten(0, 1).numpy(),
            scaling=attention.scaling,
            window=_window(attention),
            out=linear(attention.o_proj),
            mlp_gain=_gain(before_mlp, gate_up),
            mlp_epsilon=float(before_mlp.variance_epsilon),
            gate_up=gate_up,
            down=linear(mlp.down_proj),
        )

    @property
    def shape(self) -> tuple[object, ...]:
        """Layers of one shape share the room to compute in."""
        linears: tuple[Linear, ...] = (self.qkv, self.out, self.gate_up, self.down)
        return (*((each.in_features, each.out_features) for each in linears), self.keys.shape)

    @property
    def parts(self) -> Mapping[str, tuple[nn.Module, slice]]:
        """By the name of each of the model's own linear layers: the product it is a part of, and
        its outputs there.
        """
        heads = self.out.in_features
        keys = heads + self.keys.shape[1] * self.dim
        inner = self.down.in_features
        return {
            "self_attn.q_proj": (self.qkv, slice(0, heads)),
            "self_attn.k_proj": (self.qkv, slice(heads, keys)),
            "self_attn.v_proj": (self.qkv, slice(keys, None)),
            "self_attn.o_proj": (self.out, slice(None)),
            "mlp.gate_proj": (self.gate_up, slice(0, inner)),
            "mlp.up_proj": (self.gate_up, slice(inner, None)),
            "mlp.down_proj": (self.down, slice(None)),
        }

    @property
    def dim(self) -> int:
        """Of a head."""
        dim: int = self.keys.shape[-1]
        return dim


def _window(attention: Any) -> int | None:
    """Its own, if it has a word on it; else its model's."""
    place = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(place, "sliding_window", None)
    return window


def _gain(norm: Any, behind: PackedLinear | Int8Linear) -> Floats:
    # A copy: one tensor left of a mapped weight file keeps all of it in memory.
    gain: Floats = norm.weight.detach().numpy().copy()
    return gain * behind.gain if isinstance(behind, Int8Linear) else gain


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

    Args:
        layer: any one; room to compute in is as large as it needs.
        rows: how many.
        additions: of the products; none, unless it is ``adaptable``.
    """

    adaptable: ClassVar[bool]

    def __init__(self, layer: Layer[Any], rows: int, additions: Additions) -> None: ...

    def before_attention(self, layer: Layer[Any], x: Floats, shared: Pass) -> None:
        """The pass's queries, and keys and values in the cache."""
        ...

    def after_attention(self, layer: Layer[Any], x: Floats, shared: Pass) -> None:
        """To ``x`` what the heads have found."""
        ...

    def feed_forward(self, layer: Layer[Any], x: Floats) -> None:
        """To ``x`` what the gated layers make of it."""
        ...
