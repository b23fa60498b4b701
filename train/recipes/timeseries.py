"""System 19, time series: classical methods on all of M3, and two networks trained on it.

Theta, exponential smoothing and ARIMA are fitted to each of the 3 003 series, fanned out in
chunks. An LSTM and a Transformer learn from the monthly series and the first eleven years
of AirPassengers. Everything is measured through the predictor that the artifact serves.

Errors follow Makridakis & Hibon (2000): horizons of 6, 8, 18 and 8 steps for yearly,
quarterly, monthly and other series; sMAPE = mean of 200 |forecast - value| / (|forecast| +
|value|), first over the steps of a series, then over series. (The paper's own tables take
the mean over all steps of all series at once; that is ``m3_smape_steps_…``.)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from pydantic import Field, model_validator

from models.predictors import forecast
from models.predictors.forecast.settings import FILE, NetworkSettings, Settings
from train.data import Part, m3
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.space import Choice, Float

if TYPE_CHECKING:
    from torch import Tensor

    from models.predictors.forecast.networks import Ensemble

Classical = Literal["theta", "ets", "arima"]
Neural = Literal["lstm", "transformer"]

PERIOD = 12
"""Of the series that networks learn from: months."""
BASELINE = "naive"


class TimeSeries(Config):
    methods: tuple[Classical, ...] = ("theta", "ets", "arima")
    """Fitted to every M3 series; clients may ask for them, too."""
    networks: tuple[Neural, ...] = ("lstm", "transformer")
    """Trained on the monthly ones."""
    serve: str = "theta"
    """The method of a request that names none: any of ``methods`` and ``networks``, or
    ``naive`` or ``sarima``, which every artifact knows."""
    series: int | None = Field(default=None, ge=20)
    """Take so many of M3 instead of all."""
    part: Part = "test"
    """``validation``: everything ends one horizon earlier, and the test part stays unseen. Choose
    a configuration there."""
    chunk: int = Field(default=48, ge=1)
    """Series a task."""
    coverage: float = Field(default=0.9, gt=0, lt=1)
    """Of the intervals."""

    context: int = Field(default=36, ge=2 * PERIOD, le=240)
    """Values a network sees."""
    width: int = Field(default=64, ge=8, multiple_of=4)
    layers: int = Field(default=2, ge=1, le=8)
    """Of the Transformer."""
    members: int = Field(default=3, ge=1, le=20)
    """Networks of each kind, from different seeds, whose mean is taken."""
    steps: int = Field(default=800, ge=1)
    """Of training, each member."""
    batch: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)

    @model_validator(mode="after")
    def _serves_what_it_has(self) -> TimeSeries:
        known = self.known
        if self.serve not in known:
            raise ValueError(f"serve is {self.serve!r}; this configuration has {', '.join(known)}")
        return self

    @property
    def known(self) -> tuple[str, ...]:
        return (BASELINE, "sarima", *self.methods, *self.networks)


def run(config: TimeSeries, context: RunContext) -> Metrics:
    series = m3.m3(config.part, config.series)
    air = m3.air_passengers(config.part)
    journal = Journal(config, context)
    classical = _settings(config, networks=())
    for method in (BASELINE, *config.methods):
        for group in m3.HORIZONS:
            with_group = [one for one in series if one.group == group]
            chunks = [
                Chunk(settings=classical, method=method, series=part)
                for part in _split(with_group, config.chunk)
            ]
            journal.score(method, group, partial(context.map, forecast_chunk, chunks))

    monthly = [one for one in series if one.group == "monthly"]
    for kind in config.networks:
        journal.train(kind, [*(one.known for one in monthly), air.known])

    settings = _settings(config, networks=config.networks)
    (context.artifact / FILE).write_text(settings.model_dump_json(indent=2) + "\n")
    predictor = forecast.load(context.artifact)
    for kind in config.networks:
        journal.score(kind, "monthly", partial(_networks, predictor, kind, monthly))
    return {**journal.metrics(), **_on_air(predictor, config.known, air)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One task of the fan-out."""

    settings: Settings
    method: str
    series: Sequence[m3.Series]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one series, by steps: mean is what the paper's tables sum up."""

    smape: float
    covered: float
    """Share of values inside the interval."""
    steps: int


def forecast_chunk(chunk: Chunk) -> list[Score]:
    return measure(forecast.Forecaster(chunk.settings, {}), chunk.method, chunk.series)


def measure(
    predictor: forecast.Forecaster, method: str, series: Sequence[m3.Series]
) -> list[Score]:
    answers = predictor.predict_batch([_request(one, method) for one in series])
    return [_score(one, answer) for one, answer in zip(series, answers, strict=True)]


def _networks(
    predictor: forecast.Forecaster, method: str, series: Sequence[m3.Series]
) -> list[list[Score]]:
    return [measure(predictor, method, series)]


def _request(series: m3.Series, method: str) -> Any:
    return {
        "series": series.known.tolist(),
        "period": series.period,
        "horizon": len(series.future),
        "method": method,
    }


def _score(series: m3.Series, answer: Any) -> Score:
    found, truth = np.array(answer["forecast"]), series.future
    inside = (np.array(answer["lower"]) <= truth) & (truth <= np.array(answer["upper"]))
    errors = 200 * np.abs(found - truth) / (np.abs(found) + np.abs(truth))
    return Score(smape=float(errors.mean()), covered=float(inside.mean()), steps=len(series.future))


def _on_air(
    predictor: forecast.Forecaster, methods: Sequence[str], air: m3.Series
) -> dict[str, float]:
    """Mean absolute percentage error of the last twelve months, by method."""
    answers = cast("list[Any]", predictor.predict_batch([_request(air, name) for name in methods]))
    return {
        f"air_mape_{name}": float(
            100 * np.mean(np.abs(np.array(answer["forecast"]) - air.future) / air.future)
        )
        for name, answer in zip(methods, answers, strict=True)
    }


class Journal:
    """The scores and weights there are so far; an interrupted run goes on behind them."""

    def __init__(self, config: TimeSeries, context: RunContext) -> None:
        self._config = config
        self._context = context
        self._scores: dict[str, list[Score]] = {}
        self._step = 0
        groups = len(m3.HORIZONS) * (1 + len(config.methods))
        self._total = groups + len(config.networks) * (1 + config.members * REPORTS)
        context.artifact.mkdir(parents=True, exist_ok=True)
        for weights in context.artifact.glob("*.safetensors"):
            weights.unlink()  # only a checkpoint vouches for what an earlier attempt left
        if context.checkpoint is not None:
            self._read(context.checkpoint)

    def score(self, method: str, group: str, measure: Callable[[], list[list[Score]]]) -> None:
        """Measure unless that was done before the interruption."""
        self._step += 1
        key = f"{method}_{group}"
        if key in self._scores:
            return
        self._scores[key] = [score for scores in measure() for score in scores]
        if self._scores[key]:
            smape = float(np.mean([score.smape for score in self._scores[key]]))
            self._report({f"m3_smape_{key}": smape}, save=True)

    def train(self, kind: Neural, series: Sequence[m3.Array]) -> None:
        from safetensors.torch import save_file

        weights = self._context.artifact / f"{kind}.safetensors"
        end = self._step + self._config.members * REPORTS
        if not weights.exists():
            shape = _network(self._config, kind)
            training = train_network(shape, series, self._config, self._context.device)
            for ensemble, loss in training:
                self._step += 1
                done = self._step == end
                if done:
                    state = {name: tensor.cpu() for name, tensor in ensemble.state_dict().items()}
                    save_file(state, weights)
                self._report({f"loss_{kind}": loss}, save=done)
        self._step = end

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        methods = (BASELINE, *self._config.methods, *self._config.networks)
        for method in methods:
            groups = {group: self._scores.get(f"{method}_{group}", []) for group in m3.HORIZONS}
            for group, scores in groups.items():
                if scores:
                    found[f"m3_smape_{method}_{group}"] = _mean(scores, "smape")
            scores = [score for group in groups.values() for score in group]
            if scores:
                found[f"m3_coverage_{method}"] = _mean(scores, "covered")
            if method not in self._config.networks:
                found[f"m3_smape_{method}"] = _mean(scores, "smape")
                steps = sum(score.steps for score in scores)
                total = sum(score.smape * score.steps for score in scores)
                found[f"m3_smape_steps_{method}"] = total / steps
        return found

    def _report(self, metrics: Metrics, *, save: bool) -> None:
        self._context.report(
            metrics,
            step=self._step,
            total=self._total,
            checkpoint=self._write if save else None,
        )

    def _write(self, folder: Path) -> None:
        plain = {
            key: [[score.smape, score.covered, score.steps] for score in scores]
            for key, scores in self._scores.items()
        }
        (folder / "scores.json").write_text(json.dumps(plain))
        for weights in self._context.artifact.glob("*.safetensors"):
            shutil.copyfile(weights, folder / weights.name)

    def _read(self, folder: Path) -> None:
        plain = json.loads((folder / "scores.json").read_text())
        self._scores = {
            key: [
                Score(smape=smape, covered=covered, steps=int(steps))
                for smape, covered, steps in rows
            ]
            for key, rows in plain.items()
        }
        for weights in folder.glob("*.safetensors"):
            shutil.copyfile(weights, self._context.artifact / weights.name)


REPORTS = 10
"""While one member is trained."""


def train_network(
    shape: NetworkSettings, series: Sequence[m3.Array], config: TimeSeries, device: str
) -> Iterator[tuple[Ensemble, float]]:
    """Train the members one after the other, on windows of the logarithms.

    Each series is equally likely, and so is each of its origins that has two seasons behind
    it and a value ahead. The loss is the pinball loss of the median and both ends of the
    interval.

    Yields:
        The ensemble, and the mean loss since the last time; ``REPORTS`` times a member.
    """
    import torch

    from models.predictors.forecast.networks import Ensemble

    windows = Windows(series, shape, device)
    sides = ((1 - config.coverage) / 2, 0.5, (1 + config.coverage) / 2)
    quantiles_3 = torch.tensor(sides, device=device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        ensemble = Ensemble(shape).to(device).train()
    for number, member in enumerate(ensemble.members):
        generator = torch.Generator().manual_seed(1_000 * config.seed + number)
        optimizer = torch.optim.AdamW(member.parameters(), lr=config.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=config.steps + 1
        )
        losses: list[Tensor] = []
        for step in range(1, config.steps + 1):
            logs_bc, known_bc, target_bh, valid_bh = windows.draw(config.batch, generator)
            error_bh3 = target_bh.unsqueeze(-1) - member(logs_bc, known_bc)
            pinball_bh3 = torch.maximum(quantiles_3 * error_bh3, (quantiles_3 - 1) * error_bh3)
            loss = (pinball_bh3.sum(-1) * valid_bh).sum() / valid_bh.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(member.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if due := _reports_at(step, config.steps):
                mean = float(torch.stack(losses).mean())
                losses.clear()
                for _ in range(due):
                    yield ensemble, mean


class Windows:
    """Training examples, cut from padded logarithms of all series."""

    def __init__(self, series: Sequence[m3.Array], shape: NetworkSettings, device: str) -> None:
        import torch

        least = shape.shortest
        usable = [np.log(values) for values in series if len(values) > least and values.min() > 0]
        self._shape = shape
        self._device = device
        self._lengths = torch.tensor([len(values) for values in usable])
        width = shape.context + int(self._lengths.max()) + shape.horizon
        self._logs = torch.zeros(len(usable), width)
        self._known = torch.zeros(len(usable), width)
        for row, values in enumerate(usable):
            inside = slice(shape.context, shape.context + len(values))
            self._logs[row, inside] = torch.from_numpy(values).float()
            self._known[row, inside] = 1

    def draw(self, count: int, generator: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Context (b, c), what of it is known, target (b, h), what of it there is."""
        import torch

        shape = self._shape
        row_b1 = torch.randint(len(self._lengths), (count, 1), generator=generator)
        room_b1 = self._lengths[row_b1] - shape.shortest
        share_b1 = torch.rand(count, 1, generator=generator)
        origin_b1 = shape.shortest + (share_b1 * room_b1).long().clamp(max=room_b1 - 1)
        column_bt = origin_b1 + torch.arange(shape.context + shape.horizon)
        logs_bt = self._logs[row_b1, column_bt].to(self._device)
        known_bt = self._known[row_b1, column_bt].to(self._device)
        c = shape.context
        return logs_bt[:, :c], known_bt[:, :c], logs_bt[:, c:], known_bt[:, c:]


def _reports_at(step: int, steps: int) -> int:
    """How many of ``REPORTS`` are due; several at once where there are fewer steps."""
    return step * REPORTS // steps - (step - 1) * REPORTS // steps


def _network(config: TimeSeries, kind: Neural) -> NetworkSettings:
    return NetworkSettings(
        kind=kind,
        period=PERIOD,
        context=config.context,
        horizon=m3.HORIZONS["monthly"],
        width=config.width,
        layers=config.layers,
        members=config.members,
    )


def _settings(config: TimeSeries, networks: Sequence[Neural]) -> Settings:
    known = tuple(name for name in config.known if name not in config.networks)
    return Settings(
        default=config.serve if config.serve in known or config.serve in networks else BASELINE,
        methods=(*known, *networks),
        coverage=config.coverage,
        networks=tuple(_network(config, kind) for kind in networks),
    )


def _split(series: Sequence[m3.Series], size: int) -> list[Sequence[m3.Series]]:
    return [series[start : start + size] for start in range(0, len(series), size)]


def _mean(scores: Sequence[Score], name: str) -> float:
    return float(np.mean([getattr(score, name) for score in scores]))


SAMPLE_SERIES = [
    *(112, 118, 132, 129, 121, 135, 148, 148, 136, 119, 104, 118),
    *(115, 126, 141, 135, 125, 149, 170, 170, 158, 133, 114, 140),
    *(145, 150, 178, 163, 172, 178, 199, 199, 184, 162, 146, 166),
]
"""AirPassengers, 1949 to 1951."""

BETTER_THAN_LAST_YEAR = {
    f"air_mape_{network}": Gate(
        at_most=9.98, baseline="the year before, repeated, has 9.99 on AirPassengers' last year"
    )
    for network in ("lstm", "transformer")
}

AS_ELSEWHERE = {
    "air_mape_sarima": Gate(
        at_most=3.2, baseline="statsmodels' SARIMAX has 2.90 on AirPassengers' last year"
    )
}
AS_LAST_YEAR = "as last year: 15.19 (m3_smape_naive)"
ON_ALL_OF_M3 = {
    "m3_smape_theta": Gate(at_most=12.8, baseline=f"12.76 is published; {AS_LAST_YEAR}"),
    "m3_smape_ets": Gate(at_most=15.18, baseline=AS_LAST_YEAR),
    "m3_smape_arima": Gate(at_most=15.18, baseline=AS_LAST_YEAR),
}

RECIPE = Recipe(
    name="timeseries",
    summary="Forecasts: Theta, exponential smoothing, ARIMA on all of M3; LSTM and Transformer",
    kind="forecaster",
    config=TimeSeries,
    run=run,
    gates=BETTER_THAN_LAST_YEAR | AS_ELSEWHERE | ON_ALL_OF_M3,
    smoke=TimeSeries(series=20, members=1, steps=20, batch=32, width=8),
    smoke_gates=BETTER_THAN_LAST_YEAR | AS_ELSEWHERE,
    load=forecast.load,
    sample=(
        {"series": SAMPLE_SERIES, "period": 12, "horizon": 12},
        {"series": SAMPLE_SERIES, "period": 12, "horizon": 18, "method": "lstm"},
        {"series": SAMPLE_SERIES[:10], "horizon": 3},
    ),
    space={
        "learning_rate": Float(low=3e-4, high=1e-2, log=True),
        "width": Choice((32, 64, 128)),
        "context": Choice((24, 36, 48)),
    },
    licence="Apache-2.0",
    data=m3.CARD,
)
