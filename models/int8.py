"""Matrices in int8: whole numbers, and a scale for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-30
"""In place of the largest value of a row of zeros."""


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) → the same in int8, and a scale for each row: their product is near."""
    import torch

    scale = matrix.abs().amax(1, keepdim=True).clamp(min=TINY) / 127
    return (matrix / scale).round_().to(torch.int8), scale[:, 0]
