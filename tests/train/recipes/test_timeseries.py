"""Time series: the data is M3, the measures are the paper's, an interrupted run goes on."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.predictors.forecast import Forecaster
from models.predictors.forecast.settings import NetworkSettings, Settings
from train.context import Context
from train.data.m3 import HORIZONS, Series, air_passengers, m3
from train.events import Reported
from train.recipe import Save
from train.recipes.timeseries import RECIPE, SAMPLE_SERIES, TimeSeries, Windows, measure

pytestmark = pytest.mark.integration

QUICK = RECIPE.smoke.model_copy(update={"methods": ("theta",)})


def test_the_data_is_m3() -> None:
    series = m3()
    assert len(series) == 3003
    groups = Counter(one.group for one in series)
    assert groups == {"yearly": 645, "quarterly": 756, "monthly": 1428, "other": 174}
    periods = {"yearly": 1, "quarterly": 4, "monthly": 12, "other": 1}
    for one in series:
        assert len(one.future) == HORIZONS[one.group]
        assert one.period == periods[one.group]
        assert min(one.known.min(), one.future.min()) > 0


def test_a_part_of_it_is_always_the_same() -> None:
    names = [one.name for one in m3(limit=40)]
    assert names == [one.name for one in m3(limit=40)]
    assert len(set(names)) == 40
    assert {one.group for one in m3(limit=40)} == set(HORIZONS)


def test_validation_never_sees_the_test_part() -> None:
    for test, validation in zip(m3(limit=20), m3("validation", limit=20), strict=True):
        joined = np.concatenate([validation.known, validation.future])
        assert joined.tolist() == test.known.tolist()
        assert len(validation.future) == len(test.future)


def test_air_passengers() -> None:
    air = air_passengers()
    assert (len(air.known), len(air.future)) == (132, 12)
    assert air.known[:36].tolist() == SAMPLE_SERIES
    assert air.future.tolist() == [417, 391, 419, 461, 472, 535, 622, 606, 508, 461, 390, 432]


def test_measures() -> None:
    """200 |f - y| / (|f| + |y|), by hand."""
    one = Series(
        name="one",
        group="yearly",
        period=1,
        known=np.array([9.0] * 8 + [10.0]),
        future=np.array([10.0, 30.0, 10.0, 1000.0]),
    )
    forecaster = Forecaster(Settings(default="naive", methods=("naive",), coverage=0.9), {})
    (score,) = measure(forecaster, "naive", [one])
    assert score.smape == pytest.approx((0 + 100 + 0 + 200 * 990 / 1010) / 4)
    assert score.covered == 0.5
    assert score.steps == 4


def test_windows_pair_what_was_known_with_what_came() -> None:
    """Values are their own places, so that each can be asked where it comes from."""
    import torch

    shape = NetworkSettings(
        kind="lstm", period=4, context=10, horizon=6, width=8, layers=1, members=1
    )
    series = [np.exp(100.0 * row + np.arange(9 + 5 * row)) for row in range(3)]
    windows = Windows([*series, np.ones(8), -np.ones(50)], shape, "cpu")
    generator = torch.Generator().manual_seed(0)
    context, known, target, valid = windows.draw(2_000, generator)
    origins: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for logs, seen, ahead, there in zip(context, known, target, valid, strict=True):
        row = int(logs[-1]) // 100
        length, origin = 9 + 5 * row, round(float(logs[-1])) - 100 * row + 1
        origins[row].add(origin)
        assert seen.tolist() == [float(place >= 0) for place in range(origin - 10, origin)]
        assert there.tolist() == [float(place < length) for place in range(origin, origin + 6)]
        whole = torch.cat([logs[seen > 0], ahead[there > 0]])
        first = max(origin - 10, 0)
        assert whole.tolist() == pytest.approx(
            [100 * row + place for place in range(first, min(origin + 6, length))], abs=1e-3
        )
    assert origins == {row: set(range(8, 9 + 5 * row)) for row in range(3)}


def test_what_is_served_must_be_there() -> None:
    assert TimeSeries(methods=(), networks=(), serve="sarima").serve == "sarima"
    with pytest.raises(ValueError, match=r"serve is 'ets'.*naive, sarima, theta"):
        TimeSeries(methods=("theta",), networks=(), serve="ets")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("run")
    return out, dict(RECIPE.run(QUICK, Context(out=out)))


def test_a_quick_run(undisturbed: tuple[Path, dict[str, float]]) -> None:
    out, metrics = undisturbed
    for name, gate in RECIPE.smoke_gates.items():
        assert gate.holds(metrics[name]), name
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["air_mape_naive"] == pytest.approx(9.99, abs=0.005)
    assert metrics["air_mape_sarima"] == pytest.approx(2.90, abs=0.005), "as statsmodels has it"
    assert RECIPE.load is not None
    answers: Any = RECIPE.load(out / "artifact").predict_batch(RECIPE.sample)
    assert [answer["method"] for answer in answers] == ["theta", "lstm", "theta"]
    assert [len(answer["forecast"]) for answer in answers] == [12, 18, 3]


class _Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 21])
def test_an_interrupted_run_goes_on(
    undisturbed: tuple[Path, dict[str, float]], tmp_path: Path, after: int
) -> None:
    """Killed behind a report, started again from the last checkpoint, twice."""
    checkpoints: list[Path] = []
    steps: list[int] = []

    def keep(report: Reported, save: Save | None) -> None:
        steps.append(report.step)
        if save is not None:
            folder = tmp_path / f"checkpoint{len(checkpoints)}"
            folder.mkdir()
            save(folder)
            checkpoints.append(folder)
        if len(steps) in (after, after + 3):
            raise _Killed

    for attempt in range(3):
        found = checkpoints[-1] if checkpoints else None
        context = Context(out=tmp_path / f"run{attempt}", checkpoint=found, on_report=keep)
        try:
            metrics = dict(RECIPE.run(QUICK, context))
        except _Killed:
            continue
        assert metrics == undisturbed[1]
        assert len(steps) > after + 3
        return
    raise AssertionError("it never ended")


def test_every_report_is_a_step_further(undisturbed: tuple[Path, dict[str, float]]) -> None:
    """And the last one is the total."""
    out = undisturbed[0].parent / "again"
    reports: list[Reported] = []
    RECIPE.run(QUICK, Context(out=out, on_report=lambda report, save: reports.append(report)))
    steps = [report.step for report in reports]
    assert steps == sorted(set(steps))
    assert {report.total for report in reports} == {steps[-1]}
