"""Measures of explanations, on networks for which the best explanation is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.predictors import image
from train.recipes.explain_images import measures


class OnePixel(nn.Module):
    """Label 1 as long as one pixel is light."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        light = 50 * (pixels[:, 0, 1, 1] - 0.5)
        return torch.stack([-light, light], 1)


def test_deletion_is_small_when_the_reason_goes_first() -> None:
    pixels = torch.ones(2, 1, 7, 4)  # 28 pixels, one a step
    importance = torch.zeros(2, 7, 4)
    importance[0, 1, 1] = 1
    importance[1, 1, 1] = -1
    first, last = measures.deletion(OnePixel(), pixels, torch.tensor([1, 1]), importance).tolist()
    assert first == pytest.approx(0.5 / 28, abs=1e-6)
    assert last == pytest.approx(27.5 / 28, abs=1e-6)
    assert pixels.min() == 1  # looked at, not changed


def test_deletion_ends_with_an_empty_image() -> None:
    seen: list[torch.Tensor] = []

    class Seeing(OnePixel):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            seen.append(pixels.clone())
            return super().forward(pixels)

    measures.deletion(Seeing(), torch.ones(1, 1, 28, 28), torch.tensor([1]), torch.rand(1, 28, 28))
    assert len(seen) == measures.STEPS + 1
    assert [int(batch.sum()) for batch in seen] == [28 * left for left in range(28, -1, -1)]


def test_ours_are_captums() -> None:
    net = image.build(image.Architecture(channels=(4, 8), hidden=8), seed=2).eval()
    pixels = torch.rand(32, 1, 28, 28)  # one alone may gain next to nothing
    labels = torch.arange(32) % 10
    assert measures.captum_error(net, pixels, labels) < 1e-6
    assert measures.completeness_error(net, pixels, labels) < 0.05


def test_a_linear_network_is_imitated_perfectly() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 2))
    found = measures.lime_r2(net, torch.rand(2, 1, 28, 28), torch.tensor([0, 1]), seed=0)
    assert 0.95 < found <= 1
