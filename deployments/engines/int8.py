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

import torch
from torch import nn

from deployments.engines.linears import bias_of
from models.int8 import quantise

LEVELS = 255
HALF = 128
TINY = 1e-8
"""Of what is divided by."""


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
        self._inverse: torch.Tensor | None = None
        if largest is not None:
            smooth = (largest.clamp(min=TINY) / weight.abs().amax(0).clamp(min=TINY)).sqrt()
            smooth /= smooth.log().mean().exp()  # so that only differences between channels count
            weight = weight * smooth
            self._inverse = 1 / smooth
        whole, self._scale = quantise(weight)
        self._weight = whole.t()
        """``[in_features, out_features]``."""
        self._sums = whole.sum(1, dtype=torch.int32) * self._scale
        self._bias: torch.Tensor | None = None
        if any(linear.bias is not None for linear in linears):
            self._bias = torch.cat([bias_of(linear) for linear in linears])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        rows = x.reshape(-1, self.in_features)
        if self._inverse is not None:
            rows = rows * self._inverse
        low, high = rows.aminmax(dim=-1, keepdim=True)
        step = ((high - low) / LEVELS).clamp_(min=TINY)
        # x ≈ step · (whole + 128) + low, and so is y, with the sums of the weights for the ones.
        whole = ((rows - low) / step).sub_(HALF).round_().to(torch.int8)
        y = (torch._int_mm(whole, self._weight) * step).mul_(self._scale)
        y.addcmul_(low.add_(step, alpha=HALF), self._sums)
        if self._bias is not None:
            y += self._bias
        return y.reshape(*x.shape[:-1], self.out_features)


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
