"""Packed layers compute what PEFT computes, gradients included."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import nn

from train.recipes.llm.frozen import Frozen, FrozenLinear, _kept, exchange_dropout, freeze


def adapted(dropout: float, bias: bool) -> Any:
    """A net of two adapted layers, B not zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.GELU(), nn.Linear(40, 8, bias=bias))
    config = peft.LoraConfig(r=4, lora_alpha=9, lora_dropout=dropout, target_modules=["0", "2"])
    network = peft.get_peft_model(net, config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return network


def result(network: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of input and adapters."""
    x = x.clone().requires_grad_()
    trained = [p for p in network.parameters() if p.requires_grad]
    out = network(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *trained])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_peft(bias: bool, training: bool) -> None:
    network = adapted(dropout=0.0 if training else 0.5, bias=bias).train(training)
    x = torch.randn(2, 7, 24)
    expected = result(network, x)
    with network.disable_adapter(), torch.no_grad():
        base = network(x)
    assert freeze(network) == 2
    for ours, theirs in zip(result(network, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with network.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(network(x), base, rtol=1e-5, atol=1e-5)


def test_dropout_is_undone_on_average_and_follows_the_seed() -> None:
    network = adapted(dropout=0.3, bias=False)
    freeze(network)
    x = torch.randn(1, 3, 24)
    torch.manual_seed(1)
    first = result(network.train(), x)
    torch.manual_seed(1)
    again = result(network, x)
    other = result(network, x)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    layer = network.base_model.model[0]
    kept = layer.eval()(x)
    mean = sum(layer.train()(x) for _ in range(3000)) / 3000
    torch.testing.assert_close(mean, kept, rtol=0.2, atol=0.5)


def test_gradients_under_dropout_are_those_of_finite_differences() -> None:
    network = adapted(dropout=0.3, bias=False)
    freeze(network)
    layer = network.base_model.model[0].train()
    a = layer.lora_A["default"].weight
    x, direction = torch.randn(5, 24, requires_grad=True), torch.randn_like(a)
    along = torch.randn_like(x)

    start = a.detach().clone()

    def value(step: float) -> torch.Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            a.copy_(start + step * direction)
        out: torch.Tensor = layer(x + step * along).sum()
        return out

    grad_x, grad_a = torch.autograd.grad(value(0.0), [x, a])
    slope = float((grad_x * along).sum() + (grad_a * direction).sum())
    measured = float((value(1e-2) - value(-1e-2)).detach()) / 2e-2
    assert slope == pytest.approx(measured, rel=2e-3)


def test_unpacked_layers_drop_the_same_elements() -> None:
    packed, plain = adapted(dropout=0.3, bias=False), adapted(dropout=0.3, bias=False)
    freeze(packed)
    exchange_dropout(plain)
    x, results = torch.randn(2, 7, 24), []
    for network in (packed, plain):
        torch.manual_seed(5)
        results.append(result(network.train(), x))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_kept_has_the_right_share() -> None:
    kept = _kept(torch.Size([1000, 321]), 0.05)
    share = float(kept.float().mean())
    assert abs(share - 0.95) < 5 * math.sqrt(0.05 * 0.95 / kept.numel())
    assert kept.shape == (1000, 321)


def test_layers_that_are_trained_or_of_other_kinds_stay() -> None:
    linear = nn.Linear(4, 4)
    assert not Frozen.fits(linear)
    linear.requires_grad_(False)
    assert Frozen.fits(linear)
    assert not Frozen.fits(linear.double())
    assert not Frozen.fits(nn.LayerNorm(4).requires_grad_(False))
    x = torch.randn(3, 4, requires_grad=True)
    frozen = FrozenLinear(linear.float())
    (slope,) = torch.autograd.grad(frozen(x).sum(), x)
    torch.testing.assert_close(slope, linear.weight.sum(0).expand(3, 4))
