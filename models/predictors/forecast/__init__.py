"""Forecasts of a series that a client sends, by a method fitted to it or a trained network.

{"series": [112, 118, …], "period": 12, "horizon": 12, "method": "theta"}
→ {"forecast": […], "lower": […], "upper": […], "method": "theta"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import numpy as np
from pydantic import Field

from models.contracts import Json
from models.errors import ConfigError
from models.predictors.forecast.methods import (
    FURTHEST,
    METHODS,
    SHORTEST,
    Limits,
    Unfit,
    statsforecast,
)
from models.predictors.forecast.settings import FILE, NetworkSettings, Settings
from models.predictors.forecast.smoothing import Forecast
from models.predictors.requests import Input, Number, parse, refuse

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = max(method.limits.longest for method in METHODS.values())


class Request(Input):
    series: Annotated[list[Number], Field(min_length=SHORTEST, max_length=LONGEST)]
    """Equally spaced, oldest first, without gaps."""
    period: Annotated[int, Field(strict=True, ge=1, le=1_000)] = 1
    """Steps of a season: 12 for months, 4 for quarters, 1 for none."""
    horizon: Annotated[int, Field(strict=True, ge=1, le=FURTHEST)] = 1
    """Steps to forecast."""
    method: str | None = None


class Forecaster:
    """A Predictor: fits or applies the method that a request names, or the default one."""

    def __init__(self, settings: Settings, networks: Mapping[str, Network]) -> None:
        self._settings = settings
        self._networks = networks
        unknown = {settings.default, *settings.methods} - METHODS.keys() - networks.keys()
        if unknown:
            raise ConfigError(f"The artifact names methods that are not there: {sorted(unknown)}.")

    def predict_batch(self, inputs: Sequence[Json]) -> Sequence[Json]:
        """Raises InvalidInput, with ``details["index"]``; before anything is computed, unless a
        method cannot be fitted to a series that looks well.
        """
        requests = parse(Request, inputs)
        names = [self._method(request, index) for index, request in enumerate(requests)]
        outputs: list[Json] = [None] * len(requests)
        for name in sorted(set(names)):
            places = [place for place, one in enumerate(names) if one == name]
            found = self._forecasts(name, [(place, requests[place]) for place in places])
            for place, forecast in zip(places, found, strict=True):
                outputs[place] = _answer(forecast, name, place)
        return outputs

    def _forecasts(self, name: str, requests: Sequence[tuple[int, Request]]) -> list[Forecast]:
        if name in self._networks:
            return self._networks[name].forecast(
                [request.series for _, request in requests],
                [request.horizon for _, request in requests],
            )
        return [self._fit(name, index, request) for index, request in requests]

    def _fit(self, name: str, index: int, request: Request) -> Forecast:
        series = np.array(request.series, dtype=np.float64)
        try:
            return METHODS[name].forecast(
                series, request.period, request.horizon, self._settings.coverage
            )
        except Unfit as error:
            raise refuse(index, "series", f"{name} cannot be fitted to it: {error}.") from error

    def _method(self, request: Request, index: int) -> str:
        """The name of the method, if it can take this series."""
        name = request.method or self._settings.default
        if name not in {self._settings.default, *self._settings.methods}:
            known = ", ".join(self._settings.methods)
            raise refuse(index, "method", f"method is {name!r}; this model knows {known}.")
        fitted = self._networks.get(name)
        limits = fitted.limits if fitted is not None else METHODS[name].limits
        if found := limits.problem(request.series, request.period, request.horizon):
            field, problem = found
            raise refuse(index, field, f"{field} {problem} (method {name}).")
        return name


class Network:
    """One trained neural forecaster. In float64, so that a batch mate moves no visible digit."""

    def __init__(self, settings: NetworkSettings, weights: Path) -> None:
        from safetensors.torch import load_file

        from models.predictors.forecast.networks import Ensemble

        self.settings = settings
        self.limits = Limits(
            shortest=settings.shortest,
            longest=LONGEST,
            periods=(settings.period, settings.period),
            furthest=settings.horizon,
            positive=True,
        )
        ensemble = Ensemble(settings)
        ensemble.load_state_dict(load_file(weights))
        self.ensemble = ensemble.double().eval()

    def forecast(
        self, series: Sequence[Sequence[float]], horizons: Sequence[int]
    ) -> list[Forecast]:
        """Series are positive and have ``settings.shortest`` values or more."""
        import torch

        with torch.inference_mode():
            curves_bh3 = self.ensemble(*self.seen(series)).exp().numpy()
        return [
            Forecast(
                lower=curves_h3[:horizon, 0],
                mean=curves_h3[:horizon, 1],
                upper=curves_h3[:horizon, 2],
            )
            for curves_h3, horizon in zip(curves_bh3, horizons, strict=True)
        ]

    def seen(self, series: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
        """What the network sees of them: logarithms (b, c), and which are known."""
        import torch

        from models.predictors.forecast.networks import contexts

        length = self.settings.context
        tails = [torch.tensor(values[-length:], dtype=torch.float64).log() for values in series]
        return contexts(tails, length)


def load(folder: Path) -> Forecaster:
    """The loader that manifests name.

    Raises:
        ConfigError: the artifact is incomplete, or its methods need a library that is missing.
    """
    settings = Settings.model_validate_json((folder / FILE).read_bytes())
    networks: dict[str, Network] = {
        shape.kind: Network(shape, folder / f"{shape.kind}.safetensors")
        for shape in settings.networks
    }
    if {settings.default, *settings.methods} - networks.keys() - {"naive"}:
        statsforecast()  # takes seconds: now, not within the first request
    return Forecaster(settings, networks)


def _answer(forecast: Forecast, method: str, index: int) -> Json:
    curves = (forecast.mean, forecast.lower, forecast.upper)
    if not all(np.isfinite(curve).all() for curve in curves):
        raise refuse(index, "series", f"{method} finds no finite forecast; try another method.")
    mean, lower, upper = (cast("list[Json]", curve.tolist()) for curve in curves)
    return {"forecast": mean, "lower": lower, "upper": upper, "method": method}
