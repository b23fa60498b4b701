"""Layers between whose products all is in float32, one kernel between any two.

The products too, unless it is a pass in int8 with an adapter.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from deployments.engines import kernels
from deployments.engines.fused.layer import Additions, Layer, Norm, Pass
from deployments.engines.int8 import Int8Linear
from deployments.engines.kernels import Floats
from deployments.engines.linears import PackedLinear

AnyLayer: TypeAlias = Layer[PackedLinear] | Layer[Int8Linear]
NONE: Additions = {}


class FloatArithmetic:
    """See ``Arithmetic``.

    Args:
        additions: to the products.
    """

    def __init__(self, layer: AnyLayer, rows: int, additions: Additions = NONE) -> None:
        self._additions = additions
        self._narrow = torch.empty(rows, layer.qkv.in_features)
        self._wide = torch.empty(rows, layer.down.in_features)
        self._narrow_array: Floats = self._narrow.numpy()
        self._wide_array: Floats = self._wide.numpy()

    def before_attention(self, layer: AnyLayer, x: Floats, shared: Pass) -> None:
        self._normalise(layer.attention_norm, x)
        kernels.rotate_and_place(
            self._product(layer.qkv, self._narrow),
            shared.cos,
            shared.sin,
            shared.turned,
            layer.keys,
            layer.values,
            shared.places,
        )

    def after_attention(self, layer: AnyLayer, x: Floats, shared: Pass) -> None:
        kernels.add(self._product(layer.out, shared.heads), x)

    def feed_forward(self, layer: AnyLayer, x: Floats) -> None:
        self._normalise(layer.mlp_norm, x)
        kernels.activate(self._product(layer.up, self._narrow), layer.gated, self._wide_array)
        kernels.add(self._product(layer.down, self._wide), x)

    def _normalise(self, by: Norm, x: Floats) -> None:
        kernels.normalise(x, by.gain, by.shift, by.epsilon, by.centred, self._narrow_array)

    def _product(self, linear: PackedLinear | Int8Linear, x: torch.Tensor) -> Floats:
        product = linear.forward(x)
        if linear in self._additions:
            given, out = x[None], product[None]  # a tensor of its own: room is used again
            for outputs, add in self._additions[linear]:
                add(given, out[:, :, outputs])
        floats: Floats = product.numpy()
        return floats
