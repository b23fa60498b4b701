"""The methods that are fitted to each series when it comes, by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import ConfigError
from models.predictors.forecast.smoothing import Array, Forecast, naive, reach


class Unfit(Exception):
    """The method cannot be fitted to this series."""


SHORTEST = 8
"""Values of a series; with fewer there is no telling a trend from noise."""
FURTHEST = 1_000
"""Steps ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a method can take."""

    longest: int
    """Values of a series; fitting this many takes a second or two at most, so that one request
    does not hold up the others of its batch."""
    periods: tuple[int, int]
    """From, to."""
    shortest: int = SHORTEST
    furthest: int = FURTHEST
    positive: bool = False
    """It works on logarithms."""

    def problem(self, series: Sequence[float], period: int, horizon: int) -> tuple[str, str] | None:
        """The field at fault and what is wrong with it."""
        low, high = self.periods
        if not low <= period <= high:
            return "period", f"is {period}; it takes {low}" + (f" to {high}" if low < high else "")
        if horizon > self.furthest:
            return "horizon", f"is {horizon}; it looks {self.furthest} steps ahead"
        if not self.shortest <= len(series) <= self.longest:
            expected = f"it needs {self.shortest} to {self.longest}"
            return "series", f"has {len(series)} values; {expected}"
        if self.positive and min(series) <= 0:
            return "series", f"has a value of {min(series)}; it works on logarithms"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    forecast: Callable[[Array, int, int, float], Forecast]
    """Series, period, horizon, coverage → forecast."""
    limits: Limits


def theta(series: Array, period: int, horizon: int, coverage: float) -> Forecast:
    """The Theta method (Assimakopoulos & Nikolopoulos 2000), which won the M3 competition.

    The points are statsforecast's. Its intervals are drawn at random, cover 66 % of the
    yearly M3 values where 90 % are asked for, and are far too wide around an additive season;
    these follow from the method's own smoothing instead.
    """
    mean = _library(statsforecast().Theta(season_length=period), series, horizon)["mean"]
    half = reach(series, period, horizon, coverage)
    return Forecast(mean=mean, lower=mean - half, upper=mean + half)


def ets(series: Array, period: int, horizon: int, coverage: float) -> Forecast:
    """Exponential smoothing, its form chosen by AICc (Hyndman et al. 2002)."""
    model = statsforecast().AutoETS(season_length=_season(series, period))
    return _forecast(model, series, horizon, coverage)


def arima(series: Array, period: int, horizon: int, coverage: float) -> Forecast:
    """ARIMA, its orders chosen by unit root tests and AICc (Hyndman & Khandakar 2008)."""
    model = statsforecast().AutoARIMA(
        season_length=_season(series, period),
        approximation=True,  # candidates by conditional sum of squares, the choice by likelihood
    )
    return _forecast(model, series, horizon, coverage)


def sarima(series: Array, period: int, horizon: int, coverage: float) -> Forecast:
    """ARIMA(0,1,1)(0,1,1) of the logarithms: the airline model of Box & Jenkins (1970)."""
    season = _season(series, period)
    seasonal = (0, 1, 1) if season > 1 else (0, 0, 0)
    # By likelihood, from where the conditional sum of squares begins: by likelihood alone the
    # library's search stays at zero.
    model = statsforecast().ARIMA(
        order=(0, 1, 1), season_length=season, seasonal_order=seasonal, method="CSS-ML"
    )
    logs = _forecast(model, np.log(series), horizon, coverage)
    return Forecast(mean=np.exp(logs.mean), lower=np.exp(logs.lower), upper=np.exp(logs.upper))


METHODS: Mapping[str, Method] = {
    "naive": Method(forecast=naive, limits=Limits(longest=10_000, periods=(1, 1_000))),
    "theta": Method(forecast=theta, limits=Limits(longest=2_000, periods=(1, 400))),
    "ets": Method(forecast=ets, limits=Limits(longest=1_000, periods=(1, 24))),
    "arima": Method(forecast=arima, limits=Limits(longest=200, periods=(1, 12))),
    "sarima": Method(forecast=sarima, limits=Limits(longest=500, periods=(1, 12), positive=True)),
}


def _season(series: Array, period: int) -> int:
    """1, for no season, where the series is too short to show two of them."""
    return period if len(series) >= 2 * period + 5 else 1


def statsforecast() -> Any:
    """The library's models. Importing it takes seconds and 270 MB, numba is not in it."""
    try:
        from statsforecast import models
    except ImportError as error:
        raise ConfigError(
            "Theta, exponential smoothing and ARIMA need pip install 'frontier-run[timeseries]'."
        ) from error
    return models


def _forecast(model: Any, series: Array, horizon: int, coverage: float) -> Forecast:
    level = 100 * coverage
    found = _library(model, series, horizon, level)
    return Forecast(mean=found["mean"], lower=found[f"lo-{level}"], upper=found[f"hi-{level}"])


def _library(
    model: Any, series: Array, horizon: int, level: float | None = None
) -> dict[str, Array]:
    """What statsforecast answers.

    The series goes in as it is, unless it is so large or small that the library's bounds and
    tolerances, which know no units, would bite.
    """
    size = float(np.abs(series).max())
    unit = 1.0 if 1e-6 <= size <= 1e8 or size == 0 else size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about candidates that the selection then drops
        try:
            found = model.forecast(
                y=series / unit, h=horizon, level=None if level is None else [level]
            )
        except Exception as error:  # the library raises bare ones
            raise Unfit(str(error) or type(error).__name__) from error
    return {name: np.asarray(curve, dtype=np.float64) * unit for name, curve in found.items()}
