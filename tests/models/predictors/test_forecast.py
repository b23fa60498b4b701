"""The forecasting predictor: what it takes, what it answers, and that batches do not matter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import ConfigError, InvalidInput
from models.predictors.forecast import Forecaster, load
from models.predictors.forecast.methods import METHODS
from models.predictors.forecast.settings import FILE, NetworkSettings, Settings

MONTHS = [100 + month + 20 * math.sin(month * math.pi / 6) for month in range(60)]
FITTED = sorted(METHODS)


@pytest.fixture(scope="module")
def forecaster(tmp_path_factory: pytest.TempPathFactory) -> Forecaster:
    """All methods, and networks that have learned nothing but are not silent."""
    import torch
    from safetensors.torch import save_file

    from models.predictors.forecast.networks import Ensemble

    folder = tmp_path_factory.mktemp("artifact")
    shapes = [
        NetworkSettings(kind=kind, period=12, context=36, horizon=18, width=8, layers=1, members=2)
        for kind in ("lstm", "transformer")
    ]
    for seed, shape in enumerate(shapes):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            ensemble = Ensemble(shape)
            for member in ensemble.members:
                torch.nn.init.normal_(member.head.weight, std=0.02)
        save_file(ensemble.state_dict(), folder / f"{shape.kind}.safetensors")
    settings = Settings(
        default="theta",
        methods=(*FITTED, "lstm", "transformer"),
        coverage=0.9,
        networks=tuple(shapes),
    )
    (folder / FILE).write_text(settings.model_dump_json())
    return load(folder)


@pytest.mark.parametrize("method", [*FITTED, "lstm", "transformer"])
def test_every_method_forecasts(forecaster: Forecaster, method: str) -> None:
    (answer,) = forecaster.predict_batch(
        [{"series": MONTHS, "period": 12, "horizon": 14, "method": method}]
    )
    found: Any = answer
    assert found["method"] == method
    lower, mean, upper = (np.array(found[name]) for name in ("lower", "forecast", "upper"))
    assert lower.shape == mean.shape == upper.shape == (14,)
    assert (lower <= mean).all()
    assert (mean <= upper).all()
    assert 80 < mean.mean() < 220


def test_a_fresh_network_is_the_seasonal_naive() -> None:
    import torch

    from models.predictors.forecast.networks import Ensemble, contexts

    for kind in ("lstm", "transformer"):
        shape = NetworkSettings(
            kind=kind, period=12, context=30, horizon=18, width=8, layers=1, members=1
        )
        logs = torch.tensor(MONTHS, dtype=torch.float64).log()
        found = Ensemble(shape).double()(*contexts([logs], 30))[0, :, 1].exp()
        assert found.tolist() == pytest.approx([*MONTHS[-12:], *MONTHS[-12:-6]])


def test_the_default_is_used_where_none_is_named(forecaster: Forecaster) -> None:
    request = {"series": MONTHS, "period": 12, "horizon": 3}
    plain, named = forecaster.predict_batch([request, {**request, "method": "theta"}])
    assert plain == named
    (short,) = forecaster.predict_batch([{"series": MONTHS[:8]}])
    assert len(short["forecast"]) == 1  # type: ignore[index,call-overload,arg-type]


def test_an_answer_does_not_depend_on_the_batch(forecaster: Forecaster) -> None:
    random = np.random.default_rng(0)
    requests: list[Any] = [
        {
            "series": np.exp(random.normal(size=24 + 7 * number)).tolist(),
            "period": 12,
            "horizon": 1 + number % 18,
            "method": ["theta", "naive", "ets", "lstm", "transformer"][number % 5],
        }
        for number in range(20)
    ]
    together: list[Any] = list(forecaster.predict_batch(requests))
    order = random.permutation(20)
    shuffled: list[Any] = list(forecaster.predict_batch([requests[place] for place in order]))
    for request, answer in zip(requests, together, strict=True):
        (alone,) = forecaster.predict_batch([request])
        _same(alone, answer)
        assert len(answer["forecast"]) == request["horizon"]
    for place, answer in zip(order, shuffled, strict=True):
        _same(answer, together[place])


def _same(one: Any, other: Any) -> None:
    assert one["method"] == other["method"]
    for curve in ("forecast", "lower", "upper"):
        assert one[curve] == pytest.approx(other[curve], rel=1e-12)


BAD: list[tuple[Any, str, str]] = [
    ("text", "input", "must be an object"),
    ({}, "series", "required"),
    ({"series": []}, "series", "at least 8"),
    ({"series": MONTHS[:7]}, "series", "at least 8"),
    ({"series": [1.0] * 10_001}, "series", "at most 10000"),
    ({"series": [*MONTHS, None]}, "series.60", "valid number"),
    ({"series": [*MONTHS, "9"]}, "series.60", "valid number"),
    ({"series": [*MONTHS, True]}, "series.60", "valid number"),
    ({"series": [*MONTHS, math.nan]}, "series.60", "finite"),
    ({"series": [*MONTHS, 1e300]}, "series.60", "less than"),
    ({"series": MONTHS, "period": 0}, "period", "greater than"),
    ({"series": MONTHS, "period": 12.5}, "period", "integer"),
    ({"series": MONTHS, "horizon": 1001}, "horizon", "less than"),
    ({"series": MONTHS, "horizon": "3"}, "horizon", "integer"),
    ({"series": MONTHS, "frequency": "M"}, "frequency", "Extra"),
    ({"series": MONTHS, "method": "prophet"}, "method", "knows .*theta"),
    ({"series": [1.0] * 201, "method": "arima"}, "series", "needs 8 to 200"),
    ({"series": MONTHS, "period": 52, "method": "ets"}, "period", "takes 1 to 24"),
    ({"series": [*MONTHS, 0], "method": "sarima"}, "series", "logarithms"),
    ({"series": MONTHS, "period": 4, "method": "lstm"}, "period", "takes 12"),
    ({"series": MONTHS[:20], "period": 12, "method": "lstm"}, "series", "needs 24"),
    ({"series": [*MONTHS, -1], "period": 12, "method": "lstm"}, "series", "logarithms"),
    (
        {"series": MONTHS, "period": 12, "horizon": 19, "method": "transformer"},
        "horizon",
        "18 steps",
    ),
]


@pytest.mark.parametrize(("request_", "param", "message"), BAD)
def test_a_bad_input_is_refused_by_name(
    forecaster: Forecaster, request_: Any, param: str, message: str
) -> None:
    good = {"series": MONTHS}
    with pytest.raises(InvalidInput, match=message) as caught:
        forecaster.predict_batch([good, good, request_, good])
    assert caught.value.param == param
    assert caught.value.details["index"] == 2


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize(
    "series",
    [
        [5.0] * 30,
        [0.0] * 30,
        [0.0] * 29 + [1.0],
        [1.0, 1e9] * 15,
        [1e-90 * (number + 1) for number in range(30)],
        [1e90 * (number + 1) for number in range(30)],
        [-5.0, 3.0, 8.0] * 10,
        [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0],
    ],
)
def test_strange_series_get_a_finite_forecast_or_a_reason(
    forecaster: Forecaster, method: str, series: list[float]
) -> None:
    request: Any = {"series": series, "period": 4, "horizon": 5, "method": method}
    try:
        (answer,) = forecaster.predict_batch([request])
    except InvalidInput as error:
        reason = error.message
    else:
        found: Any = answer
        assert np.isfinite([found["forecast"], found["lower"], found["upper"]]).all()
        return
    assert method in reason
    assert method not in ("theta", "naive")


def test_a_method_that_is_not_there_is_a_mistake_of_the_artifact(tmp_path: Path) -> None:
    settings = Settings(default="lstm", methods=("theta",), coverage=0.9)
    (tmp_path / FILE).write_text(settings.model_dump_json())
    with pytest.raises(ConfigError, match="lstm"):
        load(tmp_path)
