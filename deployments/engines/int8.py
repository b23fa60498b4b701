"""Linear layers in int8 for the CPU: a quarter of the bytes, and products on the int8 units.

``y = x Wᵀ + b``, with

- weights in 8 bits, one scale for each output;
- activations in 8 bits, with a scale and an offset for each row, found as the row comes;
- products summed exactly in int32 (``torch._int_mm``: oneDNN's s8s8s32).

Activations of language models have a few large channels, beside which all others would be
rounded to nothing. So channels are evened out first: activations divided and weights multiplied
by ``max|x|^½ / max|W|^½`` of each input channel, with ``max|x|`` seen on some text (SmoothQuant:
Xiao et al., ICML 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from deployments.engines import kernels
from deployments.engines.kernels import Bytes, Floats
from deployments.engines.linears import bias_of
from models.int8 import quantise

TINY = 1e-8
"""Of what is divided by."""


class Rows:
    """Of activations in int8, as the kernels write them and ``multiply`` reads them."""

    def __init__(self, count: int, width: int) -> None:
        self.tensor = torch.empty(count, width, dtype=torch.int8)
        self.array: Bytes = self.tensor.numpy()
        self.steps: Floats = np.empty((2, count), np.float32)
        """Step and base of each."""


class Product:
    """Of rows in int8 and a weight, summed in int32."""

    def __init__(self, count: int, width: int) -> None:
        self.tensor = torch.empty(count, width, dtype=torch.int32)
        self.array = self.tensor.numpy()
        self.floats = self.tensor.view(torch.float32)
        """The same memory, once a kernel has put floats there."""


class Int8Linear(nn.Module):
    """Inference only.

    Args:
        linears: float32, over the same input; their outputs come one after the other.
        largest: ``[in_features]``, the largest magnitude of each input channel; ``None``: channels
            are left as they are.
    """

    def __init__(self, *linears: nn.Linear, largest: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        weight = torch.cat([linear.weight.detach() for linear in linears])
        gain = torch.ones(self.in_features)
        if largest is not None:
            smooth = (largest.clamp(min=TINY) / weight.abs().amax(0).clamp(min=TINY)).sqrt()
            smooth /= smooth.log().mean().exp()  # so that only differences between channels count
            weight = weight * smooth
            gain = 1 / smooth
        self.gain: Floats = gain.numpy()
        """What an input is multiplied by before it is rounded."""
        whole, scale = quantise(weight)
        self.weight = whole.t()
        """``[in_features, out_features]``."""
        sums = whole.sum(1, dtype=torch.int32) * scale
        bias = torch.cat([bias_of(linear) for linear in linears])
        self.terms: Floats = torch.stack([scale, sums, bias]).numpy()
        """``[3, out_features]``: scale, sums and bias of each output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        given = x.reshape(-1, self.in_features).contiguous()
        rows, product = self.rounded(given)
        kernels.dequantise(product.array, rows.steps, self.terms)
        return product.floats.reshape(*x.shape[:-1], self.out_features)

    def rounded(self, given: torch.Tensor) -> tuple[Rows, Product]:
        """``[rows, in_features]`` in int8, and their product without scales."""
        rows = Rows(len(given), self.in_features)
        product = Product(len(given), self.out_features)
        kernels.quantise_int8(given.numpy(), self.gain, rows.array, rows.steps)
        self.multiply(rows, product)
        return rows, product

    def multiply(self, rows: Rows, product: Product) -> None:
        """Without scales."""
        torch._int_mm(rows.tensor, self.weight, out=product.tensor)


class Int8Head(nn.Module):
    """An output layer whose largest outputs are those of float32: int8 finds them, and they are
    computed again. A sampler reads little else; of the others int8 says how small they are.

    Args:
        linear: float32.
        inputs: ``[rows, in_features]``, such as it gets; they show how far int8 is off.
    """

    def __init__(self, linear: nn.Linear, *, inputs: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Its channels are not evened out: there it is the weights that lose by it.
        self._rough = Int8Linear(linear)
        self.weight = linear.weight
        """The embedding's too, where the two are one."""
        off = float((self._rough(inputs) - linear(inputs)).abs().max())
        self.margin = 2 * off

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        given = x.reshape(-1, self.in_features).contiguous()
        rows, product = self._rough.rounded(given)
        kernels.rescore(
            product.array,
            rows.steps,
            self._rough.terms,
            given.numpy(),
            self.weight.detach().numpy(),
            self.margin,
        )
        return product.floats.reshape(*x.shape[:-1], self.out_features)


@contextmanager
def observed_inputs(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Learn from forward passes in the block what a module gets: ``[rows, width]`` of each."""
    inputs: list[torch.Tensor] = []

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        inputs.append(given[0].detach().flatten(0, -2))

    hook = module.register_forward_pre_hook(note)
    try:
        yield inputs
    finally:
        hook.remove()


@contextmanager
def observed_ranges(model: nn.Module) -> Iterator[Mapping[nn.Linear, torch.Tensor]]:
    """Learn from forward passes in the block how large each input channel of each layer gets.

    Yields what is filled while the block runs: ``[in_features]`` by layer.
    """
    largest: dict[nn.Linear, torch.Tensor] = {}

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        seen = given[0].detach().reshape(-1, module.in_features).abs().amax(0)
        before = largest.get(module)
        largest[module] = seen if before is None else torch.maximum(before, seen)

    linears = [module for module in model.modules() if type(module) is nn.Linear]
    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()
