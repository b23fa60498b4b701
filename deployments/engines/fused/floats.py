"""Layers in float32: packed products, and one kernel between two of them."""

from __future__ import annotations

import torch

from deployments.engines import kernels
from deployments.engines.fused.layer import Layer, Pass
from deployments.engines.kernels import Floats
from deployments.engines.linears import PackedLinear


class FloatArithmetic:
    """See ``Arithmetic``."""

    def __init__(self, layer: Layer[PackedLinear], rows: int) -> None:
        self._narrow = torch.empty(rows, layer.qkv.in_features)
        self._wide = torch.empty(rows, layer.down.in_features)
        self._narrow_array: Floats = self._narrow.numpy()
        self._wide_array: Floats = self._wide.numpy()

    def before_attention(self, layer: Layer[PackedLinear], x: Floats, shared: Pass) -> None:
        kernels.normalise(x, layer.attention_gain, layer.attention_epsilon, self._narrow_array)
        kernels.rotate_and_place(
            layer.qkv.forward(self._narrow).numpy(),
            shared.cos,
            shared.sin,
            shared.turned,
            layer.keys,
            layer.values,
            shared.places,
        )

    def after_attention(self, layer: Layer[PackedLinear], x: Floats, shared: Pass) -> None:
        kernels.add(layer.out.forward(shared.heads).numpy(), x)

    def feed_forward(self, layer: Layer[PackedLinear], x: Floats) -> None:
        kernels.normalise(x, layer.mlp_gain, layer.mlp_epsilon, self._narrow_array)
        kernels.gate(layer.gate_up.forward(self._narrow).numpy(), self._wide_array)
        kernels.add(layer.down.forward(self._wide).numpy(), x)
