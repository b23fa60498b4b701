"""Decoder layers in int8 without the model's own modules: five kernels and four products a layer.

For layers as Llama has them, by their structure: RMSNorm, attention with rotary positions, RMSNorm,
gated SiLU, each added to what came in. What only looks like one (other norms, a scale somewhere)
is found out at load, where each layer is held against the model's own (``compared``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deployments.engines import int8_kernels as kernels
from deployments.engines.attention import SlotAttention
from deployments.engines.int8 import Int8Linear, Product, Rows
from deployments.engines.int8_kernels import Floats
from deployments.engines.kv import SlotCache
from deployments.engines.linears import SharedLinear, relative_difference

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


class OtherStructure(Exception):
    """A model that is computed by its own modules."""


@dataclass(frozen=True, slots=True)
class Layer:
    attention_gain: Floats
    """Of the norm before, and of the product after."""
    attention_epsilon: float
    qkv: Int8Linear
    keys: Floats
    """``[places, kv_heads, dim]``: the cache's own."""
    values: Floats
    scaling: float
    window: int | None
    out: Int8Linear
    mlp_gain: Floats
    mlp_epsilon: float
    gate_up: Int8Linear
    down: Int8Linear

    @classmethod
    def of(cls, layer: Any, keys: torch.Tensor, values: torch.Tensor) -> Layer:
        """Raises OtherStructure."""
        leaves = {name for name, each in layer.named_modules() if not any(each.children())}
        if leaves != LEAVES:
            raise OtherStructure(f"its layers have {sorted(leaves ^ LEAVES)} more or less")
        attention, mlp = layer.self_attn, layer.mlp
        qkv = _int8(SharedLinear.together([attention.q_proj, attention.k_proj, attention.v_proj]))
        gate_up = _int8(SharedLinear.together([mlp.gate_proj, mlp.up_proj]))
        attention_gain, attention_epsilon = _gain(layer.input_layernorm, qkv)
        mlp_gain, mlp_epsilon = _gain(layer.post_attention_layernorm, gate_up)
        return cls(
            attention_gain=attention_gain,
            attention_epsilon=attention_epsilon,
            qkv=qkv,
            keys=keys.flatten(0, 1).numpy(),
            values=values.flatten(0, 1).numpy(),
            scaling=attention.scaling,
            window=getattr(attention, "sliding_window", None),
            out=_int8(attention.o_proj),
            mlp_gain=mlp_gain,
            mlp_epsilon=mlp_epsilon,
            gate_up=gate_up,
            down=_int8(mlp.down_proj),
        )


class _Pass:
    """What the layers of one forward pass share: positions, places, and room to compute in."""

    def __init__(
        self, first: Layer, count: int, cos: torch.Tensor, sin: torch.Tensor, places: torch.Tensor
    ) -> None:
        dim = first.keys.shape[-1]
        if cos.shape[-1] != dim or first.values.shape != first.keys.shape:
            raise OtherStructure("it turns a part of each head, or has values of another size")
        self.cos, self.sin = cos.contiguous().numpy(), sin.contiguous().numpy()
        self.places = places.numpy()
        query = torch.empty(count, first.out.in_features // dim, dim)
        self.turned: Floats = query.numpy()
        self.query = query.transpose(0, 1)
        self.attended = torch.empty_like(query)
        self.heads: Floats = self.attended.flatten(1).numpy()
        self.narrow = Rows(count, first.qkv.in_features)
        self.of_heads = Rows(count, first.out.in_features)
        self.wide = Rows(count, first.down.in_features)
        self.projected = Product(count, first.qkv.out_features)
        self.gated = Product(count, first.gate_up.out_features)
        self.change = Product(count, first.qkv.in_features)


class FusedDecoder:
    """Computes what the model's own ``forward`` does.

    Args:
        model: its linear layers in int8; has run, so that the cache has its tensors.

    Raises:
        OtherStructure: it is none that is known here.
    """

    def __init__(self, model: PreTrainedModel, cache: SlotCache, attention: SlotAttention) -> None:
        try:
            decoder: Any = model.get_decoder()
            self._modules: list[nn.Module] = list(decoder.layers)
            self._layers = [
                Layer.of(layer, cache.keys[index], cache.values[index])
                for index, layer in enumerate(self._modules)
            ]
            self._norm: nn.Module = decoder.norm
            self._rotary: nn.Module = decoder.rotary_emb
        except (AttributeError, KeyError) as error:
            raise OtherStructure(str(error)) from error
        self._model = model
        self._embed = model.get_input_embeddings()
        self._head: nn.Module = model.get_output_embeddings()
        self._cache = cache
        self._attention = attention

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """Logits ``[len(keep), vocabulary]``.

        Args:
            tokens: ``[rows]``, as are the next two.
            places: in the cache, ``slot · context + position``.
            keep: rows that logits are wanted of.
        """
        x = self._embed(tokens)
        cos, sin = self._rotary(x[None], positions[None])
        shared = _Pass(self._layers[0], len(tokens), cos[0], sin[0], places)
        rows: Floats = x.numpy()
        for index in range(len(self._layers)):
            self._layer(index, rows, shared)
        return self._logits(x[keep])

    def _layer(self, index: int, x: Floats, shared: _Pass) -> None:
        """``x [rows, width]`` becomes what the layer makes of it."""
        layer, narrow, of_heads = self._layers[index], shared.narrow, shared.of_heads
        kernels.normalise(x, layer.attention_gain, layer.attention_epsilon, *narrow.parts)
        layer.qkv.multiply(narrow, shared.projected)
        kernels.rotate_and_place(
            shared.projected.array,
            narrow.step,
            narrow.base,
            *layer.qkv.terms,
            shared.cos,
            shared.sin,
            shared.turned,
            layer.keys,
            layer.values,
            shared.places,
        )
        self._attention.attend(index, shared.query, shared.attended, layer.scaling, layer.window)
        kernels.quantise(shared.heads, layer.out.gain, *of_heads.parts)
        layer.out.multiply(of_heads, shared.change)
        kernels.add(shared.change.array, of_heads.step, of_heads.base, *layer.out.terms, x)
        kernels.normalise(x, layer.mlp_gain, layer.mlp_epsilon, *narrow.parts)
        layer.gate_up.multiply(narrow, shared.gated)
        kernels.gate(
            shared.gated.array,
            narrow.step,
            narrow.base,
            *layer.gate_up.terms,
            layer.down.gain,
            *shared.wide.parts,
        )
        layer.down.multiply(shared.wide, shared.change)
        kernels.add(shared.change.array, shared.wide.step, shared.wide.base, *layer.down.terms, x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(self._norm(x))
        return logits

    @contextmanager
    def compared(self) -> Iterator[list[float]]:
        """Compute beside each part of the model, in its passes in the block, what it computes.

        Whole passes would not do: where a number lies just between two of eight bits, the last
        digit of a float decides, and further layers make much of it.

        Yields the largest differences, of a layer relative to what it changes; filled in the block.

        Raises:
            OtherStructure: in the block, a layer is called in an unknown way.
        """
        differences: list[float] = []
        passed = torch.empty(0)
        """From one part to the next."""

        def embedded(module: nn.Module, given: Any, out: torch.Tensor) -> None:
            nonlocal passed
            passed = out[0].clone()

        def compare(
            index: int, module: nn.Module, given: Any, named: Mapping[str, Any], out: Any
        ) -> None:
            nonlocal passed
            before = (given[0] if given else named["hidden_states"])[0]
            differences.append(relative_difference(passed, before))
            if "position_embeddings" not in named:
                raise OtherStructure("its layers are told of positions in another way")
            cos, sin = named["position_embeddings"]
            shared = _Pass(self._layers[0], len(before), cos[0], sin[0], self._cache.places)
            own, x = (out[0] if isinstance(out, tuple) else out)[0], before.clone()
            self._layer(index, x.numpy(), shared)
            differences.append(relative_difference(x - before, own - before))
            passed = own.clone()

        def told(module: nn.Module, given: Any, named: Mapping[str, Any], out: Any) -> None:
            logits = self._logits(passed[named["logits_to_keep"]])
            differences.append(relative_difference(logits, out.logits[0]))

        hooks = [
            self._embed.register_forward_hook(embedded),
            self._model.register_forward_hook(told, with_kwargs=True),
        ]
        hooks += [
            module.register_forward_hook(partial(compare, index), with_kwargs=True)
            for index, module in enumerate(self._modules)
        ]
        try:
            yield differences
        finally:
            for hook in hooks:
                hook.remove()


def _int8(module: nn.Module | None) -> Int8Linear:
    if not isinstance(module, Int8Linear):
        raise OtherStructure("its layers are not all in int8, query, key and value as one")
    return module


def _gain(norm: Any, behind: Int8Linear) -> tuple[Floats, float]:
    gain: Floats = norm.weight.detach().numpy() * behind.gain
    return gain, float(norm.variance_epsilon)
