"""What decays, how the rate moves, and our own optimiser against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.errors import ConfigError
from train.recipes.llm.config import OptimiserConfig
from train.recipes.llm.optimisers import (
    OPTIMISERS,
    SCHEDULES,
    Lion,
    grouped,
    learning_rate,
    make,
    schedule,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_only_matrices_decay_and_only_what_is_trained_is_updated() -> None:
    net = Net()
    decayed, rest = grouped(net, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(net.up.weight)]
    assert decayed["weight_decay"] == 0.1
    assert {id(p) for p in rest["params"]} == {
        id(p) for p in (net.embed.weight, net.norm.weight, net.norm.bias, net.up.bias)
    }
    assert rest["weight_decay"] == 0


@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_optimiser_goes_downhill(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, 1)
    inputs, targets = torch.randn(64, 8), torch.randn(64, 1)
    optimiser = make(net, OptimiserConfig(name=name, learning_rate=0.02))
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (net(inputs) - targets).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]


def test_lion_is_the_sign_of_its_momentum() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    lion = Lion([parameter], lr=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    parameter.grad = torch.tensor([4.0, -0.1])
    lion.step()
    assert parameter.tolist() == pytest.approx([1 * 0.95 - 0.1, -2 * 0.95 + 0.1])
    parameter.grad = torch.tensor([-1.0, 0.0])  # momentum [2, -0.05] still decides both signs
    lion.step()
    assert parameter.tolist() == pytest.approx([0.85 * 0.95 - 0.1, -1.8 * 0.95 + 0.1])
    assert lion.state[parameter]["momentum"].tolist() == pytest.approx([0.5, -0.025])


def test_an_optimiser_of_your_own_and_an_unknown_one() -> None:
    net = nn.Linear(2, 2)
    config = OptimiserConfig(name="torch.optim:NoSuch")
    with pytest.raises(ConfigError, match=r"training\.optimiser\.name: .*NoSuch.* cannot be"):
        make(net, config)
    with pytest.raises(ConfigError, match="expected one of adamw, lion, sgd, adafactor, or"):
        make(net, OptimiserConfig(name="adam"))
    own = OptimiserConfig(name="tests.train.recipes.llm.experiment:rmsprop", learning_rate=3.0)
    optimiser = make(net, own)
    assert isinstance(optimiser, torch.optim.RMSprop)
    assert optimiser.param_groups[0]["lr"] == 3


def test_a_schedule_of_your_own_and_an_unknown_one() -> None:
    own = OptimiserConfig(
        schedule="tests.train.recipes.llm.experiment:halving",
        learning_rate=8.0,
        warmup=2,
        final=0.5,
    )
    assert [learning_rate(own, step, 6) for step in range(6)] == [4, 8, 8, 4, 2, 1]
    with pytest.raises(ConfigError, match="expected one of constant, linear, cosine, wsd, or"):
        schedule(OptimiserConfig(schedule="step"))
    with pytest.raises(ConfigError, match=r"training\.optimiser\.schedule: .*Step.* cannot be"):
        schedule(OptimiserConfig(schedule="torch.optim:Step"))


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    total=st.integers(1, 400),
    warmup=st.sampled_from([0, 0.05, 0.5, 3, 20]),
    final=st.floats(0, 1),
)
def test_a_schedule_warms_up_then_never_rises(
    schedule: str, total: int, warmup: float, final: float
) -> None:
    config = OptimiserConfig.model_validate(
        {"learning_rate": 1.0, "schedule": schedule, "warmup": warmup, "final": final}
    )
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert all(0 <= rate <= 1 + 1e-9 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert all(a >= b - 1e-9 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    if not warmup:
        assert rates[0] == pytest.approx(1.0)


def test_schedules_end_where_they_should() -> None:
    def rates(schedule: str) -> list[float]:
        config = OptimiserConfig.model_validate(
            {"learning_rate": 1.0, "schedule": schedule, "warmup": 0, "final": 0.1}
        )
        return [learning_rate(config, step, 100) for step in range(101)]

    assert rates("constant")[100] == 1
    assert rates("linear")[50] == pytest.approx(0.55)
    assert rates("cosine")[50] == pytest.approx(0.55)
    assert rates("wsd")[80] == pytest.approx(1)
    assert rates("wsd")[90] == pytest.approx(0.55)
    assert all(rates(name)[100] == pytest.approx(0.1) for name in ("linear", "cosine", "wsd"))
