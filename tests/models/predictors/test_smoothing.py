"""Smoothing and seasons against brute force and against what can be derived by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.predictors.forecast.methods import theta
from models.predictors.forecast.smoothing import (
    ALPHA_HIGH,
    ALPHA_LOW,
    Array,
    classical_seasonality,
    fit_smoothing,
    naive,
    reach,
)

values = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)
series = st.lists(values, min_size=8, max_size=40).map(np.array)
methods = pytest.mark.parametrize("method", [theta, naive])


def errors(values: Array, alpha: float, level: float) -> Array:
    """One-step errors, by the definition."""
    found = []
    for value in values:
        found.append(value - level)
        level += alpha * (value - level)
    return np.array(found)


def least_squares(values: Array, alpha: float) -> float:
    """Over the first level."""
    at_zero = errors(values, alpha, 0.0)
    slope = errors(values, alpha, 1.0) - at_zero
    level = -(at_zero @ slope) / (slope @ slope)
    return float(np.sum(errors(values, alpha, level) ** 2))


@pytest.mark.parametrize("seed", range(6))
def test_smoothing_is_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    walk = 1_000 + np.cumsum(random.normal(size=50)) + seed * random.normal(size=50)
    found = fit_smoothing(walk)
    best = min(least_squares(walk, alpha) for alpha in np.linspace(ALPHA_LOW, ALPHA_HIGH, 200))
    assert found.sigma**2 * 48 <= best * (1 + 1e-9)
    assert found.sigma**2 * 48 == pytest.approx(least_squares(walk, found.alpha))


def test_a_straight_line_goes_on_with_half_its_slope() -> None:
    """As the mean of a trend line and a smoothed one that has stopped growing."""
    found = theta(100 + 3.0 * np.arange(40), 1, 5, 0.9)
    assert np.diff(found.mean) == pytest.approx(np.full(4, 1.5), rel=0.01)
    assert 217 < found.mean[0] < 220


def test_a_multiplicative_season_is_found_and_scales_the_interval() -> None:
    pattern = np.array([0.5, 1.5, 1.2, 0.8])
    random = np.random.default_rng(0)
    values = 200 * np.tile(pattern, 12)[:-1] * np.exp(0.02 * random.normal(size=47))
    found = classical_seasonality(values, 4)
    assert found is not None
    assert found.multiplicative
    assert found.pattern == pytest.approx(pattern, rel=0.03)
    half = reach(values, 4, 5, 0.9)
    assert half[:4] / half[0] == pytest.approx(np.array([0.8, 0.5, 1.5, 1.2]) / 0.8, rel=0.1)
    assert half[0] == pytest.approx(1.645 * 200 * 0.02 * 0.8, rel=0.3)


@pytest.mark.parametrize("period", [4, 5, 12])
def test_an_additive_season_is_found_whatever_the_period(period: int) -> None:
    pattern = np.arange(period) - (period - 1) / 2
    values = np.tile(pattern, 7)[:-1]
    found = classical_seasonality(values, period)
    assert found is not None
    assert not found.multiplicative
    assert found.pattern == pytest.approx(pattern)
    assert found.remove(values) == pytest.approx(np.zeros(len(values)))


def test_an_additive_season_does_not_widen_the_interval() -> None:
    random = np.random.default_rng(0)
    values = np.tile([-5.0, 3.0, 8.0, 1.0], 8) + 0.1 * random.normal(size=32)
    assert reach(values, 4, 4, 0.9) == pytest.approx(np.full(4, 0.165), rel=0.5)


def test_noise_has_no_season() -> None:
    noise = np.random.default_rng(1).normal(size=120) + 10
    assert classical_seasonality(noise, 12) is None


def test_two_whole_seasons_are_needed() -> None:
    values = np.tile([10.0, *[0.0] * 11], 2)  # a spike is like nothing but itself
    assert classical_seasonality(values, 12) is not None
    assert classical_seasonality(values[:-1], 12) is None


def test_naive_repeats_the_last_season_and_widens_by_the_season() -> None:
    found = naive(np.arange(8.0), 4, 6, 0.9)
    assert found.mean.tolist() == [4, 5, 6, 7, 4, 5]
    reach = found.upper - found.mean
    assert reach[:4] == pytest.approx(4 * 1.6449, rel=1e-4)
    assert reach[4:] == pytest.approx(4 * 1.6449 * np.sqrt(2), rel=1e-4)


@methods
@given(values=series, period=st.integers(1, 13), horizon=st.integers(1, 20))
def test_any_series_has_a_finite_forecast_in_its_interval(
    method: type, values: Array, period: int, horizon: int
) -> None:
    found = method(values, period, horizon, 0.9)
    for curve in (found.mean, found.lower, found.upper):
        assert curve.shape == (horizon,)
        assert np.isfinite(curve).all()
    slack = 1e-9 * max(np.abs(values).max(), np.abs(found.mean).max())
    assert (found.lower <= found.mean + slack).all()
    assert (found.mean <= found.upper + slack).all()


@methods
@given(values=series, period=st.integers(1, 13))
def test_a_longer_horizon_only_adds_steps(method: type, values: Array, period: int) -> None:
    short, long = method(values, period, 3, 0.9), method(values, period, 15, 0.9)
    assert short.mean.tolist() == long.mean[:3].tolist()
    assert short.upper.tolist() == long.upper[:3].tolist()


@given(series, st.integers(-60, 60))
def test_units_do_not_matter_to_the_interval(values: Array, power: int) -> None:
    """By a power of two, which changes no digit."""
    unit = 2.0**power
    assert reach(values * unit, 4, 5, 0.9).tolist() == (reach(values, 4, 5, 0.9) * unit).tolist()


@methods
@pytest.mark.parametrize("value", [0.0, 7.25, -3.0])
def test_a_constant_series_stays(method: type, value: float) -> None:
    found = method(np.full(30, value), 12, 4, 0.9)
    for curve in (found.mean, found.lower, found.upper):
        assert curve == pytest.approx(np.full(4, value), abs=1e-9)
