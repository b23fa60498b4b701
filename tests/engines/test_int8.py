"""Int8 layers are as near to float32 as eight bits allow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deployments.engines.int8 import Int8Head, Int8Linear, observed_ranges


@pytest.fixture(autouse=True)
def _inference() -> object:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def error(layer: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean square, relative."""
    return float((layer(x) - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 100])
def test_near_the_plain_layer(rows: int, bias: bool) -> None:
    plain = nn.Linear(96, 72, bias=bias)
    x = torch.randn(rows, 96) + 0.5
    assert error(Int8Linear(plain), x, plain(x)) < 0.02


def test_several_layers_over_one_input_come_one_after_the_other() -> None:
    first, second = nn.Linear(32, 8, bias=False), nn.Linear(32, 24, bias=True)
    x = torch.randn(2, 5, 32)
    together = Int8Linear(first, second)(x)
    assert together.shape == (2, 5, 32)
    assert torch.allclose(together[..., :8], first(x), atol=0.05)
    assert torch.allclose(together[..., 8:], second(x), atol=0.05)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    layer = Int8Linear(nn.Linear(64, 32))
    x = torch.randn(16, 64)
    x[3] *= 1000
    together = layer(x)
    for row in range(16):
        assert torch.equal(together[row], layer(x[row : row + 1])[0])


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-6])
def test_constant_rows(value: float) -> None:
    plain = nn.Linear(16, 4)
    x = torch.full((2, 16), value)
    assert torch.allclose(Int8Linear(plain)(x), plain(x), atol=0.02)


def test_a_channel_that_is_a_hundred_times_larger_drowns_the_others_unless_smoothed() -> None:
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    plain = model[0]
    assert isinstance(plain, nn.Linear)
    x = torch.randn(500, 256)
    x[:, 17] *= 100
    plain.weight[:, 17] *= 0.01
    with observed_ranges(model) as largest:
        model(x[:400])
    seen, unseen = largest[plain], x[400:]
    assert seen.shape == (256,)
    rough = error(Int8Linear(plain), unseen, plain(unseen))
    smooth = error(Int8Linear(plain, largest=seen), unseen, plain(unseen))
    assert smooth < 0.03 < 0.1 < rough


def test_ranges_are_watched_in_the_block_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with observed_ranges(model) as largest:
        model(torch.ones(1, 4))
        model(torch.full((1, 4), -7.0))
    model(torch.full((1, 4), 100.0))
    assert len(largest) == 2
    first = model[0]
    assert isinstance(first, nn.Linear)
    assert largest[first].tolist() == [7.0] * 4


def test_the_largest_outputs_of_a_head_are_those_of_float32() -> None:
    plain = nn.Linear(64, 3000)
    inputs, x = torch.randn(200, 64), torch.randn(3, 10, 64)
    found, exact = Int8Head(plain, inputs=inputs)(x), plain(x)
    assert found.shape == exact.shape
    assert torch.equal(found.argmax(-1), exact.argmax(-1))
    near = exact >= exact.amax(-1, keepdim=True) - Int8Head(plain, inputs=inputs).margin / 2
    assert near.sum() > 30
    assert torch.allclose(found[near], exact[near], atol=1e-5)
    assert error(Int8Head(plain, inputs=inputs), x, exact) < 0.02


def test_a_head_says_of_a_row_that_is_not_finite_that_it_is_none() -> None:
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    found = Int8Head(nn.Linear(64, 100), inputs=torch.randn(9, 64))(x)
    assert torch.isnan(found).all(-1).tolist() == [False, True, False]
