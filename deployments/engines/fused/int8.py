"""Layers in int8: what lies between two products comes out in int8 again."""

from __future__ import annotations

from typing import ClassVar

from deployments.engines import kernels
from deployments.engines.fused.layer import Additions, Layer, Pass
from deployments.engines.int8 import Int8Linear, Product, Rows
from deployments.engines.kernels import Floats


class Int8Arithmetic:
    """See ``Arithmetic``."""

    adaptable: ClassVar[bool] = False
    """Adapters are for activations that are not rounded."""

    def __init__(self, layer: Layer[Int8Linear], rows: int, additions: Additions) -> None:
        assert not additions
        self._narrow = Rows(rows, layer.qkv.in_features)
        self._heads = Rows(rows, layer.out.in_features)
        self._wide = Rows(rows, layer.down.in_features)
        self._projected = Product(rows, layer.qkv.out_features)
        self._gated = Product(rows, layer.gate_up.out_features)
        self._change = Product(rows, layer.qkv.in_features)

    def before_attention(self, layer: Layer[Int8Linear], x: Floats, shared: Pass) -> None:
        narrow, projected = self._narrow, self._projected
        kernels.normalise_int8(
            x, layer.attention_gain, layer.attention_epsilon, narrow.array, narrow.steps
        )
        layer.qkv.multiply(narrow, projected)
        kernels.rotate_and_place_int8(
            projected.array,
            narrow.steps,
            layer.qkv.terms,
            shared.cos,
            shared.sin,
            shared.turned,
            layer.keys,
            layer.values,
            shared.places,
        )

    def after_attention(self, layer: Layer[Int8Linear], x: Floats, shared: Pass) -> None:
        heads = self._heads
        kernels.quantise_int8(shared.heads.numpy(), layer.out.gain, heads.array, heads.steps)
        self._add(layer.out, heads, x)

    def feed_forward(self, layer: Layer[Int8Linear], x: Floats) -> None:
        narrow, gated, wide = self._narrow, self._gated, self._wide
        kernels.normalise_int8(x, layer.mlp_gain, layer.mlp_epsilon, narrow.array, narrow.steps)
        layer.gate_up.multiply(narrow, gated)
        kernels.gate_int8(
            gated.array,
            narrow.steps,
            layer.gate_up.terms,
            layer.down.gain,
            wide.array,
            wide.steps,
        )
        self._add(layer.down, wide, x)

    def _add(self, linear: Int8Linear, rows: Rows, x: Floats) -> None:
        linear.multiply(rows, self._change)
        kernels.add_int8(self._change.array, rows.steps, linear.terms, x)
