"""Decoder layers without the model's own modules: four products, and a kernel between any two.

For layers of a structure that is known (``STRUCTURES``). What only looks like one (other norms, a
scale somewhere) is found out at load, where each layer is held against the model's own
(``compared``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deployments.engines.attention import Asked, SlotAttention
from deployments.engines.fused import OtherStructure
from deployments.engines.fused.floats import FloatArithmetic
from deployments.engines.fused.gpt2 import Gpt2
from deployments.engines.fused.int8 import Int8Arithmetic
from deployments.engines.fused.layer import Additions, Arithmetic, Layer, Pass, Structure
from deployments.engines.fused.llama import Llama
from deployments.engines.int8 import Int8Linear
from deployments.engines.kernels import Floats
from deployments.engines.kv import SlotCache
from deployments.engines.linears import PackedLinear, relative_difference
from deployments.engines.lora import Addition

STRUCTURES: Sequence[type[Structure]] = (Llama, Gpt2)
NO_ADDITIONS: Mapping[str, Addition] = {}


class FusedDecoder:
    """Computes what the model's own ``forward`` does.

    Args:
        model: its linear layers packed or in int8; has run, so that the cache has its tensors.

    Raises:
        OtherStructure: it is none that is known here.
    """

    def __init__(self, model: PreTrainedModel, cache: SlotCache, attention: SlotAttention) -> None:
        try:
            self._structure = _structure(model)
            modules = self._structure.modules
            tensors = [(cache.keys[at], cache.values[at]) for at in range(len(modules))]
            in_int8 = any(isinstance(each, Int8Linear) for each in modules[0].modules())
            kind: Any = Int8Linear if in_int8 else PackedLinear
            self._layers: list[Layer[Any]] = [
                self._structure.layer(kind, module, *places)
                for module, places in zip(modules, tensors, strict=True)
            ]
            width = self._layers[0].qkv.in_features
            cos, _ = self._structure.turn(torch.empty(1, width), torch.zeros(1, dtype=torch.long))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise OtherStructure(str(error)) from error
        if cos.shape[-1] != self._layers[0].dim:
            raise OtherStructure("it turns a part of each head")
        if any(layer.shape != self._layers[0].shape for layer in self._layers):
            raise OtherStructure("its layers are of several sizes")
        names = {module: name for name, module in model.named_modules()}
        self._parts = {
            f"{names[module]}.{name}": part
            for module, layer in zip(modules, self._layers, strict=True)
            for name, part in layer.parts.items()
        }
        self._plain: Callable[[Layer[Any], int], Arithmetic] = (
            Int8Arithmetic if in_int8 else FloatArithmetic
        )
        """Of passes without adapters."""
        self._model = model
        self._head: nn.Module = model.get_output_embeddings()
        self._cache = cache
        self._attention = attention

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        keep: torch.Tensor,
        additions: Mapping[str, Addition] = NO_ADDITIONS,
    ) -> torch.Tensor:
        """Logits ``[len(keep), vocabulary]``.

        Args:
            tokens: ``[rows]``, as are the next two.
            places: in the cache, ``slot · context + position``.
            keep: rows that logits are wanted of.
            additions: of adapters, by the name of the model's own layer; such as it ``takes``.
        """
        x = self._structure.embedded(tokens, positions)
        shared = Pass(self._layers[0], *self._structure.turn(x, positions), places)
        arithmetic = self._arithmetic(len(tokens), additions)
        rows: Floats = x.numpy()
        for index in range(len(self._layers)):
            self._layer(index, rows, shared, arithmetic)
        return self._logits(x[keep])

    def takes(self, additions: Mapping[str, Addition]) -> bool:
        return additions.keys() <= self._parts.keys()

    def _arithmetic(self, rows: int, additions: Mapping[str, Addition]) -> Arithmetic:
        layer = self._layers[0]
        if additions:
            return FloatArithmetic(layer, rows, self._by_product(additions))
        return self._plain(layer, rows)

    def _by_product(self, additions: Mapping[str, Addition]) -> Additions:
        products: dict[nn.Module, list[tuple[slice, Addition]]] = {}
        for name, add in additions.items():
            product, outputs = self._parts[name]
            products.setdefault(product, []).append((outputs, add))
        return products

    def _layer(self, index: int, x: Floats, shared: Pass, arithmetic: Arithmetic) -> None:
        """``x [rows, width]`` becomes what the layer makes of it."""
        layer = self._layers[index]
        arithmetic.before_attention(layer, x, shared)
        self._attention.attend(index, shared.query, shared.attended, layer.scaling, layer.window)
        arithmetic.after_attention(layer, x, shared)
        arithmetic.feed_forward(layer, x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(self._structure.norm(x))
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
        asked: dict[int, Asked] = {}
        passed = torch.empty(0)
        """From one part to the next."""

        def note(what: Asked) -> None:
            asked[what.layer] = what

        def embedded(module: nn.Module, given: Any, named: Mapping[str, Any]) -> None:
            nonlocal passed
            passed = self._structure.embedded(named["input_ids"][0], named["position_ids"][0])

        def compare(
            index: int, module: nn.Module, given: Any, named: Mapping[str, Any], out: Any
        ) -> None:
            nonlocal passed
            before = (given[0] if given else named["hidden_states"])[0]
            differences.append(relative_difference(passed, before))
            if "position_ids" not in named:
                raise OtherStructure("its layers are told of positions in another way")
            turn = self._structure.turn(before, named["position_ids"][0])
            if (own_turn := self._structure.own_turn(named)) is not None:
                pairs = zip(turn, own_turn, strict=True)
                differences.extend(relative_difference(a, b[0]) for a, b in pairs)
            shared = Pass(self._layers[0], *turn, self._cache.places)
            arithmetic = self._arithmetic(len(before), NO_ADDITIONS)
            own, x = (out[0] if isinstance(out, tuple) else out)[0], before.clone()
            self._layer(index, x.numpy(), shared, arithmetic)
            layer, of_attention = self._layers[index], asked[index]
            if (layer.scaling, layer.window) != (of_attention.scaling, of_attention.window):
                raise OtherStructure("its attention is asked for something else")
            differences.append(relative_difference(shared.query, of_attention.query))
            differences.append(_difference(x, own, before))
            passed = own.clone()

        def told(module: nn.Module, given: Any, named: Mapping[str, Any], out: Any) -> None:
            logits = self._logits(passed[named["logits_to_keep"]])
            differences.append(relative_difference(logits, out.logits[0]))

        hooks = [
            self._model.register_forward_pre_hook(embedded, with_kwargs=True),
            self._model.register_forward_hook(told, with_kwargs=True),
        ]
        hooks += [
            module.register_forward_hook(partial(compare, index), with_kwargs=True)
            for index, module in enumerate(self._structure.modules)
        ]
        self._attention.observe = note
        try:
            yield differences
        finally:
            self._attention.observe = None
            for hook in hooks:
                hook.remove()


def _structure(model: PreTrainedModel) -> Structure:
    """Raises AttributeError, TypeError: of the first that is tried."""
    errors: list[Exception] = []
    for kind in STRUCTURES:
        try:
            return kind(model)
        except (AttributeError, TypeError) as error:
            errors.append(error)
    raise errors[0]


def _difference(found: torch.Tensor, own: torch.Tensor, before: torch.Tensor) -> float:
    """Of what a layer made of ``before``: the largest, relative to the largest change; without what
    a sum with ``before`` loses, in which single channels can be a thousand times larger.
    """
    lost = before.abs().max() * torch.finfo(before.dtype).eps
    off = ((found - own).abs().max() - lost).clamp(min=0)
    return float(off / (own - before).abs().max().clamp(min=1e-6))
