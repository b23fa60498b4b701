"""Layers in int8: what lies between two products comes out in int8 again.

Adapters are for activations that are not rounded: a pass with one is computed as in ``floats``.
"""

from __future__ import annotations

from deployments.engines import kernels
from deployments.engines.fused.layer import Layer, Norm, Pass
from deployments.engines.int8 import Int8Linear, Product, Rows
from deployments.engines.kernels import Floats


class Int8Arithmetic:
    """See ``Arithmetic``."""

    def __init__(self, layer: Layer[Int8Linear], rows: int) -> None:
        self._qkv = layer.qkv.room(rows)
        self._out = layer.out.room(rows)
        self._up = layer.up.room(rows)
        self._down = layer.down.room(rows)

    def before_attention(self, layer: Layer[Int8Linear], x: Floats, shared: Pass) -> None:
        given, projected = self._qkv
        _normalise(layer.attention_norm, x, layer.qkv, given)
        layer.qkv.multiply(given, projected)
        kernels.rotate_and_place_int8(
            projected.array,
            given.steps,
            layer.qkv.terms,
            shared.cos,
            shared.sin,
            shared.turned,
            layer.keys,
            layer.values,
            shared.places,
        )

    def after_attention(self, layer: Layer[Int8Linear], x: Floats, shared: Pass) -> None:
        heads, change = self._out
        kernels.quantise_int8(shared.heads.numpy(), layer.out.gain, heads.array, heads.steps)
        _add(layer.out, heads, change, x)

    def feed_forward(self, layer: Layer[Int8Linear], x: Floats) -> None:
        given, wide = self._up
        _normalise(layer.mlp_norm, x, layer.up, given)
        layer.up.multiply(given, wide)
        active, change = self._down
        kernels.activate_int8(
            wide.array,
            given.steps,
            layer.up.terms,
            layer.gated,
            layer.down.gain,
            active.array,
            active.steps,
        )
        _add(layer.down, active, change, x)


def _add(linear: Int8Linear, rows: Rows, change: Product, x: Floats) -> None:
    linear.multiply(rows, change)
    kernels.add_int8(change.array, rows.steps, linear.terms, x)


def _normalise(by: Norm, x: Floats, behind: Int8Linear, rows: Rows) -> None:
    """For the product ``behind`` it."""
    kernels.normalise_int8(
        x, by.gain, by.shift, by.epsilon, by.centred, behind.gain, rows.array, rows.steps
    )
