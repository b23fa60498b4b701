"""Layers in float32: packed products, and one kernel between two of them."""

from __future__ import annotations

from typing import ClassVar

import torch

from deployments.engines import kernels
from deployments.engines.fused.layer import Additions, Layer, Pass
from deployments.engines.kernels import Floats
from deployments.engines.linears import PackedLinear


class FloatArithmetic:
    """See ``Arithmetic``."""

    adaptable: ClassVar[bool] = True

    def __init__(self, layer: Layer[PackedLinear], rows: int, additions: Additions) -> None:
        self._additions = additions
        self._narrow = torch.empty(rows, layer.qkv.in_features)
        self._wide = torch.empty(rows, layer.down.in_features)
        self._narrow_array: Floats = self._narrow.numpy()
        self._wide_array: Floats = self._wide.numpy()

    def before_attention(self, layer: Layer[PackedLinear], x: Floats, shared: Pass) -> None:
        kernels.normalise(x, layer.attention_gain, layer.attention_epsilon, self._narrow_array)
        kernels.rotate_and_place(
            self._product(layer.qkv, self._narrow),
            shared.cos,
            shared.sin,
            shared.turned,
            layer.keys,
            layer.values,
            shared.places,
        )

    def after_attention(self, layer: Layer[PackedLinear], x: Floats, shared: Pass) -> None:
        kernels.add(self._product(layer.out, shared.heads), x)

    def feed_forward(self, layer: Layer[PackedLinear], x: Floats) -> None:
        kernels.normalise(x, layer.mlp_gain, layer.mlp_epsilon, self._narrow_array)
        kernels.gate(self._product(layer.gate_up, self._narrow), self._wide_array)
        kernels.add(self._product(layer.down, self._wide), x)

    def _product(self, linear: PackedLinear, x: torch.Tensor) -> Floats:
        product = linear.forward(x)
        if linear in self._additions:
            given, out = x[None], product[None]  # a tensor of its own: room is used again
            for outputs, add in self._additions[linear]:
                add(given, out[:, :, outputs])
        floats: Floats = product.numpy()
        return floats
