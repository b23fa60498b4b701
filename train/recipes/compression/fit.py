"""The training loop that pruning and distillation share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits, and which images they are of → a number."""


def fit(
    net: nn.Module,
    pixels: Tensor,
    loss: Loss,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    batch_size: int,
    shift: int,
) -> None:
    """Adam with a rate that falls to zero in a straight line.

    Args:
        shift: each image is moved by up to so many pixels in both directions, at random.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    batches = -(-len(pixels) // batch_size)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=epochs * batches)
    net.train()
    with torch.random.fork_rng(devices=[]):  # layers with randomness of their own
        torch.manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(pixels), generator=generator).split(batch_size):
                cost = loss(net(moved(pixels[rows], shift, generator)), rows)
                optimizer.zero_grad()
                cost.backward()
                optimizer.step()
                fall.step()
    net.eval()


def moved(pixels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image (n, 1, height, width) moved on black ground."""
    if not most:
        return pixels
    count, _, height, width = pixels.shape
    padded = nn.functional.pad(pixels, (most,) * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, count), generator=generator)
    rows = (down[:, None] + torch.arange(height))[:, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


def accuracy(net: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (net(pixels).argmax(1) == labels).double().mean().item()
