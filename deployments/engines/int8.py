"""Linear layers in int8 for the CPU: a quarter of the bytes, and products on the int8 units.

``y = x Wᵀ + b``, with

- weights in 8 bits, one scale for each output;
- activations in 8 bits, with a scale and an offset for each row, found as the row comes; or in 16,
  as two rows of 8;
- products summed exactly in int32 (``torch._int_mm``: oneDNN's s8s8s32).

Activations of language models have a few large channels, beside which all others would be
rounded to nothing. So channels are evened out first: activations divided and weights multiplied
by ``max|x|^½ / max|W|^½`` of each input channel, with ``max|x|`` seen on some text (SmoothQuant:
Xiao et al., ICML 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """Of activations in int8, as the kernels write them and ``multiply`` reads them.

    Args:
        bits: 8 or 16 of each.
    """

    def __init__(self, count: int, width: int, bits: int = 8) -> None:
        self.tensor = torch.empty(bits // 8 * count, width, dtype=torch.int8)
        self.array: Bytes = self.tensor.numpy()
        self.steps: Floats = np.empty((2, count), np.float32)
        """Step and base of each."""


class Product:
    """Of rows in int8 and a weight, summed in int32.

    Args:
        bits: of the rows.
    """

    def __init__(self, count: int, width: int, bits: int = 8) -> None:
        self.tensor = torch.empty(bits // 8 * count, width, dtype=torch.int32)
        self.array = self.tensor.numpy()
        self.floats = self.tensor[:count].view(torch.float32)
        """The same memory, once a kernel has put floats there."""


class Int8Linear(nn.Module):
    """Inference only.

    Args:
        linears: float32, over the same input; their outputs come one after the other.
        largest: ``[in_features]``, the largest magnitude of each input channel; ``None``: channels
            are left as they are.
        bits: of each activation, 8 or 16.
    """

    def __init__(
        self, *linears: nn.Linear, largest: torch.Tensor | None = None, bits: int = 8
    ) -> None:
        super().__init__()
        self.bits = bits
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        weight = torch.cat([linear.weight.detach() for linear in linears])
        gain = torch.ones(self.in_features)
        if largest is not None:
            gain = evening(weight, largest)
            weight = weight / gain
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
        rows, product = self.room(len(given))
        kernels.quantise_int8(given.numpy(), self.gain, rows.array, rows.steps)
        self.multiply(rows, product)
        return rows, product

    def room(self, count: int) -> tuple[Rows, Product]:
        """For so many rows and their product."""
        return (
            Rows(count, self.in_features, self.bits),
            Product(count, self.out_features, self.bits),
        )

    def multiply(self, rows: Rows, product: Product) -> None:
        """Without scales."""
        torch._int_mm(rows.tensor, self.weight, out=product.tensor)


def evening(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """``[in_features]``: what channels are multiplied by so that they are alike."""
    smooth = (largest.clamp(min=TINY) / weight.abs().amax(0).clamp(min=TINY)).sqrt()
    return smooth.log().mean().exp() / smooth  # only differences between channels count


class Int8Head(nn.Module):
    """An output layer whose largest outputs are those of float32: int8 finds them, and they are
    computed again. A sampler reads little else; of the others int8 says how small they are.

    Args:
        linear: float32.
        margin: how much smaller than the largest an output may be in int8 and yet be larger.
    """

    def __init__(self, linear: nn.Linear, *, margin: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._rough = _rough(linear)
        self.weight = linear.weight
        """The embedding's too, where the two are one."""
        self.margin = margin

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


def _rough(linear: nn.Linear) -> Int8Linear:
    # Its channels are not evened out: there it is the weights that lose by it.
    return Int8Linear(linear)


def margin_of(linear: nn.Linear, inputs: torch.Tensor) -> float:
    """That of an ``Int8Head`` with such inputs, ``[rows, in_features]``."""
    return 2 * float((_rough(linear)(inputs) - linear(inputs)).abs().max())


@contextmanager
def observed_losses(
    model: nn.Module, largest: Mapping[nn.Linear, torch.Tensor]
) -> Iterator[Mapping[nn.Linear, float]]:
    """Learn from a forward pass in the block what layers lose by inputs of 8 bits.

    Args:
        largest: see ``observed_ranges``; channels are evened out by it.

    Yields what is filled while the block runs: by how much outputs are off, relative (roots of mean
    squares; the mean of all rows).
    """
    losses: dict[nn.Linear, float] = {}

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        gain = evening(module.weight, largest[module])
        x = given[0].detach().flatten(0, -2) * gain
        if not len(x):  # an expert that nobody asks
            return
        low = x.amin(1, keepdim=True)
        step = ((x.amax(1, keepdim=True) - low) / 255).clamp(min=TINY)
        off = ((x - low) / step).round_() * step + low - x
        lost, own = (each @ (module.weight / gain).t() for each in (off, x))
        size = own.pow(2).mean(1).sqrt().clamp(min=TINY)
        losses[module] = float((lost.pow(2).mean(1).sqrt() / size).mean())

    with _told(largest, note):
        yield losses


@contextmanager
def observed_inputs(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Learn from forward passes in the block what a module gets: ``[rows, width]`` of each."""
    inputs: list[torch.Tensor] = []

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        inputs.append(given[0].detach().flatten(0, -2))

    with _told([module], note):
        yield inputs


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
    with _told(linears, note):
        yield largest


@contextmanager
def _told(
    modules: Iterable[nn.Module], note: Callable[[nn.Module, tuple[torch.Tensor, ...]], None]
) -> Iterator[None]:
    """In the block, ``note`` is told of each call of these, before it is made."""
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
