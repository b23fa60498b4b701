"""Seasons and simple exponential smoothing: what an interval around a forecast is made of."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Arrays of one length, the horizon."""

    mean: Array
    lower: Array
    upper: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Seasonality:
    """Repeats every ``len(pattern)`` steps; ``pattern[0]`` belongs to the first observation."""

    pattern: Array
    multiplicative: bool

    def at(self, start: int, length: int) -> Array:
        return np.resize(np.roll(self.pattern, -(start % len(self.pattern))), length)

    def remove(self, values: Array) -> Array:
        seasonal = self.at(0, len(values))
        return values / seasonal if self.multiplicative else values - seasonal


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """Simple exponential smoothing, fitted."""

    alpha: float
    sigma: float
    """Standard deviation of its one-step errors."""


def reach(series: Array, period: int, horizon: int, coverage: float) -> Array:
    """Half the width of the interval around a forecast by smoothing with drift, at each step.

    The errors of the smoothing add up as in Hyndman & Billah (2003), equation 8, and a
    multiplicative season scales them.

    Args:
        coverage: as if the errors were normal; 0.9 leaves 5 % on each side.
    """
    scale = float(np.abs(series).max()) or 1.0
    values = series / scale
    seasonality = classical_seasonality(values, period)
    smoothing = fit_smoothing(seasonality.remove(values) if seasonality else values)
    spread = smoothing.sigma * np.sqrt(1 + np.arange(horizon) * smoothing.alpha**2)
    if seasonality is not None and seasonality.multiplicative:
        spread *= seasonality.at(len(values), horizon)
    return NormalDist().inv_cdf((1 + coverage) / 2) * spread * scale


def naive(series: Array, period: int, horizon: int, coverage: float) -> Forecast:
    """The last season again (the last value where there is no whole season).

    Its errors grow with each season further ahead (a seasonal random walk).
    """
    cycle = period if len(series) > period else 1
    ahead = np.arange(horizon)
    mean = np.resize(series[-cycle:], horizon)
    scale = float(np.abs(series).max()) or 1.0
    steps = (series[cycle:] - series[:-cycle]) / scale
    sigma = float(np.sqrt(np.mean(steps**2))) * scale
    half = NormalDist().inv_cdf((1 + coverage) / 2) * sigma * np.sqrt(ahead // cycle + 1)
    return Forecast(mean=mean, lower=mean - half, upper=mean + half)


def classical_seasonality(values: Array, period: int) -> Seasonality | None:
    """Classical decomposition around a centred moving average of one period.

    Returns:
        None where the autocorrelation at the period is not significant (90 %), where there are
        not two whole periods, and for periods below 4.
    """
    n = len(values)
    if period < 4 or n < 2 * period or not _seasonal(values, period):
        return None
    if values.min() > 0:
        pattern = _pattern(values, period, multiplicative=True)
        if pattern.min() >= 0.01:  # else dividing by it would blow the series up
            return Seasonality(pattern=pattern, multiplicative=True)
    return Seasonality(pattern=_pattern(values, period, multiplicative=False), multiplicative=False)


def fit_smoothing(values: Array) -> Smoothing:
    """Least squares over the weight and the first level.

    For one weight the errors are linear in the first level, so the best level is known
    exactly; the weight is found on a grid that closes in on the best one.
    """
    centred = values - values.mean()
    low, high = ALPHA_LOW, ALPHA_HIGH
    best, squares = low, 0.0
    for _ in range(_ROUNDS):
        grid = np.linspace(low, high, _GRID)
        smoothed = np.zeros(_GRID)  # from a first level of zero
        share = np.ones(_GRID)  # of the first level in the present one
        error_error, error_share, share_share = np.zeros((3, _GRID))
        for value in centred:
            error = value - smoothed
            error_error += error * error
            error_share += error * share
            share_share += share * share
            smoothed += grid * error
            share *= 1 - grid
        first = error_share / share_share
        sums = np.maximum(error_error - first * error_share, 0.0)
        at = int(np.argmin(sums))
        best, squares = float(grid[at]), float(sums[at])
        low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, _GRID - 1)])
    freedom = max(len(values) - 2, 1)
    return Smoothing(alpha=best, sigma=float(np.sqrt(squares / freedom)))


ALPHA_LOW, ALPHA_HIGH = 0.01, 0.99
_GRID, _ROUNDS = 33, 3  # the weight to 0.98 / 32 / 16 / 16 = 1e-4


def _seasonal(values: Array, period: int) -> bool:
    """Bartlett's test of the autocorrelation at the period, at 90 %, as in the M3 entry."""
    n = len(values)
    centred = values - values.mean()
    power = float(centred @ centred)
    if power <= 1e-24 * n:  # of values near one: a constant series, up to rounding
        return False
    lags = np.array([float(centred[lag:] @ centred[:-lag]) for lag in range(1, period + 1)])
    correlations = lags / power
    limit = 1.645 * float(np.sqrt((1 + 2 * np.sum(correlations[:-1] ** 2)) / n))
    return bool(abs(correlations[-1]) > limit)


def _pattern(values: Array, period: int, *, multiplicative: bool) -> Array:
    weights = np.full(period, 1 / period)
    if period % 2 == 0:  # half a step more on either side keeps the average centred
        weights = np.concatenate([[0.5], np.ones(period - 1), [0.5]]) / period
    trend = np.convolve(values, weights, mode="valid")
    start = (len(weights) - 1) // 2
    inner = values[start : start + len(trend)]
    detrended = inner / trend if multiplicative else inner - trend
    season = (np.arange(len(trend)) + start) % period
    sums = np.bincount(season, weights=detrended, minlength=period)
    pattern = sums / np.bincount(season, minlength=period)
    return pattern / pattern.mean() if multiplicative else pattern - pattern.mean()
