"""Int8 layers are as near to float32 as eight bits allow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deployments.engines.int8 import (
    Int8Head,
    Int8Linear,
    margin_of,
    observed_losses,
    observed_ranges,
)


@pytest.fixture(autouse=True)
def _inference() -> object:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def error(layer: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean square, relative."""
    return float((layer(x) - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 100])
def test_near_the_plain_layer(rows: int, bias: bool, bits: int) -> None:
    plain = nn.Linear(96, 72, bias=bias)
    x = torch.randn(rows, 96) + 0.5
    found = Int8Linear(plain, bits=bits)(x)
    assert found.shape == (rows, 72)
    assert error(Int8Linear(plain, bits=bits), x, plain(x)) < 0.02


def test_in_16_bits_only_the_weights_are_rounded() -> None:
    plain = nn.Linear(96, 72)
    plain.weight.mul_(1000).round_().clamp_(-127, 127)
    plain.weight[:, 0] = 127  # so that each row's scale is 1
    x = torch.randn(50, 96).pow(5)
    assert error(Int8Linear(plain, bits=16), x, plain(x)) < 1e-4
    assert error(Int8Linear(plain, bits=8), x, plain(x)) > 5e-3


def test_several_layers_over_one_input_come_one_after_the_other() -> None:
    first, second = nn.Linear(32, 8, bias=False), nn.Linear(32, 24, bias=True)
    x = torch.randn(2, 5, 32)
    together = Int8Linear(first, second)(x)
    assert together.shape == (2, 5, 32)
    assert torch.allclose(together[..., :8], first(x), atol=0.05)
    assert torch.allclose(together[..., 8:], second(x), atol=0.05)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    for bits in (8, 16):
        layer = Int8Linear(nn.Linear(64, 32), bits=bits)
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
    head = Int8Head(plain, margin=margin_of(plain, inputs))
    found, exact = head(x), plain(x)
    assert found.shape == exact.shape
    assert torch.equal(found.argmax(-1), exact.argmax(-1))
    near = exact >= exact.amax(-1, keepdim=True) - head.margin / 2
    assert near.sum() > 30
    assert torch.allclose(found[near], exact[near], atol=1e-5)
    assert error(head, x, exact) < 0.02


def test_a_head_says_of_a_row_that_is_not_finite_that_it_is_none() -> None:
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    found = Int8Head(nn.Linear(64, 100), margin=0.1)(x)
    assert torch.isnan(found).all(-1).tolist() == [False, True, False]


def test_what_a_layer_loses_by_eight_bits() -> None:
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    plain = model[0]
    assert isinstance(plain, nn.Linear)
    x, even = torch.randn(200, 256), torch.ones(256)
    with observed_losses(model, {plain: even}) as losses:
        plain.weight.copy_(torch.randn(64, 256))
        model(x)
        alike = losses[plain]
        assert alike == pytest.approx(error(Int8Linear(plain, largest=even), x, plain(x)), rel=0.5)
        x[torch.arange(200), torch.randint(256, (200,))] = 50.0  # in no channel more than in others
        model(x)
        assert losses[plain] > 2.5 * alike
    model(x * 0)
    assert losses[plain] > 2.5 * alike
