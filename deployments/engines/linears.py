"""Linear layers for the CPU: weights packed once into oneDNN's blocked layout.

``torch.nn.functional.linear`` repacks or walks the plain layout at every call. With the
weight packed beforehand the same product, in the same precision, takes about half the
time (``python -m benchmarks.linears`` measures it). The operator is the one that
TorchInductor emits for frozen weights.
"""

from __future__ import annotations

import torch
from torch import nn

PACK_ROWS = 32
"""Rows the layout is tuned for; it is right for any number of rows."""


class PackedLinear(nn.Module):
    """``y = x Wᵀ + b`` with ``W`` packed; inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        # A copy: one tensor left of a mapped weight file keeps all of it in memory.
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return out


def pack_linears(model: nn.Module) -> int:
    """Replace every float32 ``nn.Linear`` on the CPU; returns how many. Others are left alone."""
    if not torch._C._has_mkldnn:
        return 0
    packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if (
                type(child) is nn.Linear
                and child.weight.dtype == torch.float32
                and child.weight.device.type == "cpu"
            ):
                setattr(module, name, PackedLinear(child))
                packed += 1
    return packed
