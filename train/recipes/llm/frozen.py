"""Frozen matrices under LoRA on the CPU: packed once, and the adapter beside them in one step.

Two thirds of a LoRA step are products with weights that never change, yet
``torch.nn.functional.linear`` walks their plain layout every time; packed for oneDNN, for
both directions, they take three quarters of the time. PEFT's own forward pass also draws
dropout from torch's serial generator, at a third of a product's cost each, and writes the
adapter's share as two more tensors of the output's size. Here it is drawn eight bytes at a
time and added in place. The formula, the seed's meaning and the trained parameters are
PEFT's; ``tests/train/recipes/llm/test_frozen.py`` holds both against each other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

ROWS = 512
"""Tokens the layout is tuned for; it is right for any number of them."""


class Frozen:
    """``[out, in]`` weights for products from both sides; float32, on the CPU."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        weight = weight.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self._transposed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), ROWS)
        self._bias = None if bias is None else bias.detach()

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return (
            torch._C._has_mkldnn
            and type(module) is nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
            and not any(parameter.requires_grad for parameter in module.parameters())
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, in]`` → ``[tokens, out]``."""
        return _product(x, self._weight, self._bias)

    def backward(self, slope: torch.Tensor) -> torch.Tensor:
        """``[tokens, out]`` → ``[tokens, in]``."""
        return _product(slope, self._transposed, None)


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), packed, bias, "none", [], ""
    )
    return out


class FrozenLinear(nn.Module):
    """In place of an ``nn.Linear`` that is not trained; gradients pass through to its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.matrix = Frozen(linear.weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Through.apply(x, self.matrix)  # type: ignore[no-untyped-call]
        return out


class Dropout(nn.Module):
    """As ``nn.Dropout``, drawn as the packed layers draw it: the same elements fall out
    whether layers are packed, compiled, or divided over workers.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numpy draws
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * _kept(x.shape, self.p).to(x.dtype) / (1 - self.p)


def exchange_dropout(network: nn.Module) -> None:
    """In every LoRA layer on the CPU."""
    from peft.tuners.lora import Linear as LoraLinear

    for module in network.modules():
        if isinstance(module, LoraLinear):
            dropouts: Any = module.lora_dropout
            for name, dropout in dropouts.items():
                if isinstance(dropout, nn.Dropout):
                    dropouts[name] = Dropout(dropout.p)


def freeze(network: nn.Module) -> int:
    """Exchange what fits, layers with a LoRA adapter and without; returns how many."""
    from peft.tuners.lora import Linear as LoraLinear

    count = 0
    for module in list(network.modules()):
        if isinstance(module, LoraLinear) and _plain(module):
            layer: Any = module
            layer.base_layer = FrozenLinear(layer.base_layer)
            layer.forward = partial(_adapted, layer)
            count += 1
    return count


def _plain(module: Any) -> bool:
    """LoRA as in the paper, without variants, on a layer that fits."""
    return (
        Frozen.fits(module.base_layer)
        and list(module.lora_A) == ["default"]
        and not module.lora_variant
        and not module.lora_bias["default"]
        and not module.merged
    )


def _adapted(module: Any, x: torch.Tensor) -> torch.Tensor:
    base: FrozenLinear = module.base_layer
    if module.disable_adapters:
        return base(x)
    dropout = module.lora_dropout["default"]
    rate = dropout.p if module.training and isinstance(dropout, nn.Dropout | Dropout) else 0.0
    out: torch.Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
        x,
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
        base.matrix,
        module.scaling["default"],
        rate,
    )
    return out


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: Frozen) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix.forward(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slope,) = slopes
        matrix: Frozen = ctx.matrix
        return matrix.backward(slope.flatten(0, -2)).view(*slope.shape[:-1], -1), None


class _Adapted(torch.autograd.Function):
    """``W x + scaling · B A dropout(x)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        matrix: Frozen,
        scaling: float,
        rate: float,
    ) -> torch.Tensor:
        flat = x.flatten(0, -2)
        kept = _kept(flat.shape, rate) if rate else None
        low = _where(flat, kept) @ a.t()
        ctx.matrix, ctx.scale, ctx.shape = matrix, scaling / (1 - rate), x.shape
        ctx.save_for_backward(flat, low, a, b, kept)
        out = matrix.forward(flat).addmm_(low, b.t(), alpha=ctx.scale)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slope = slopes[0].flatten(0, -2)
        flat, low, a, b, kept = ctx.saved_tensors
        slope_low = (slope @ b).mul_(ctx.scale)
        grad_a = slope_low.t() @ _where(flat, kept)
        grad_b = (slope.t() @ low).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.matrix.backward(slope)
            if kept is None:
                grad_x.addmm_(slope_low, a)
            else:
                grad_x += _where(slope_low @ a, kept)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None


def _kept(shape: torch.Size, rate: float) -> torch.Tensor:
    """True with a probability of ``1 - rate`` (to 1/65536), from torch's seed."""
    seed = int(torch.randint(2**62, ()))
    count = shape.numel()
    words = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return torch.from_numpy(words >= round(rate * 65536)).view(shape)


def _where(x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """numpy multiplies by a bool eight times faster than torch."""
    if kept is None:
        return x
    return torch.from_numpy(np.multiply(x.detach().numpy(), kept.numpy()))
