"""The accountant against published figures, an integral, and the mechanism itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.recipes.federated import privacy


def test_abadi_et_al_2016_is_confirmed() -> None:
    """Their figure 2: q = .01, noise 4, delta 1e-5, 10 000 steps: epsilon 1.26 with the moments
    accountant, whose tail bound is the looser one used here.
    """
    orders = range(2, 65)
    spent = [(10_000 * privacy.renyi(a, noise=4, rate=0.01), a) for a in orders]
    moments = min(rdp + math.log(1e5) / (a - 1) for rdp, a in spent)
    assert moments == pytest.approx(1.26, abs=0.01)
    tighter = privacy.epsilon(noise=4, rate=0.01, rounds=10_000, delta=1e-5)
    assert 0.8 * moments < tighter < moments


@pytest.mark.parametrize(("order", "noise", "rate"), [(2, 1.0, 0.1), (5, 0.8, 0.3), (16, 2.0, 0.5)])
def test_the_formula_is_the_integral_it_stands_for(order: int, noise: float, rate: float) -> None:
    z = np.linspace(-30, 60, 900_001)
    with_us = rate * np.exp((2 * z - 1) / (2 * noise**2)) + (1 - rate)
    density = np.exp(-(z**2) / (2 * noise**2)) / math.sqrt(2 * math.pi) / noise
    integral = float(np.trapezoid(density * with_us**order, z))
    expected = math.log(integral) / (order - 1)
    assert privacy.renyi(order, noise=noise, rate=rate) == pytest.approx(expected, rel=1e-6)


def test_everyone_in_every_round_is_the_plain_gaussian() -> None:
    assert privacy.renyi(7, noise=2.0, rate=1.0) == 7 / 8
    nearly = privacy.renyi(7, noise=2.0, rate=1 - 1e-12)
    assert nearly == pytest.approx(7 / 8, rel=1e-6)


@settings(max_examples=25)
@given(st.floats(0.3, 10), st.floats(0.01, 1), st.integers(1, 1000))
def test_more_rounds_more_clients_less_noise_cost_more(
    noise: float, rate: float, rounds: int
) -> None:
    def cost(noise: float = noise, rate: float = rate, rounds: int = rounds) -> float:
        return privacy.epsilon(noise=noise, rate=rate, rounds=rounds, delta=1e-5)

    slack = 1e-9
    assert 0 <= cost() <= cost(rounds=rounds + 1) + slack
    assert cost() <= cost(noise=noise * 0.9) + slack
    assert cost(rate=rate * 0.9) <= cost() + slack


def test_without_noise_there_is_no_privacy() -> None:
    assert privacy.epsilon(noise=0, rate=0.1, rounds=1, delta=1e-5) == math.inf


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.floats(1e-3, 1e3))
def test_clipping_bounds_the_length_and_keeps_the_direction(
    row: list[float], length: float
) -> None:
    update = np.array(row)
    clipped = privacy.clip(update, length)
    assert np.linalg.norm(clipped) <= length * (1 + 1e-9)
    if np.linalg.norm(update) <= length:
        assert clipped.tolist() == row
    else:
        cosine = clipped @ update / np.linalg.norm(clipped) / np.linalg.norm(update)
        assert cosine == pytest.approx(1)


def test_the_least_number_of_members_adds_the_whole_noise() -> None:
    generator = np.random.default_rng(0)
    total = sum(
        privacy.member_noise(100_000, noise=1.5, clip=2.0, least=14, generator=generator)
        for _ in range(14)
    )
    assert np.std(total) == pytest.approx(3.0, rel=0.02)
