"""What a sweep found: a table, the best configuration, and plots of how it was found."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from models.errors import ConfigError
from train import disk
from train.progress import duration
from train.recipe import Recipe
from train.space import Choice, Float, Int
from tune.config import Sweep, domains, trial_config
from tune.journal import Status, Trial, best
from tune.search import Space, Value, better

TABLE, BEST, REPORT = "trials.csv", "best.yaml", "report.html"
PARALLEL, HISTORY = "parallel.png", "history.png"


def write(recipe: Recipe[Any], sweep: Sweep, folder: Path, trials: Sequence[Trial]) -> list[Path]:
    """Everything that can be said so far, into the folder of the sweep; what was written.

    Raises:
        ConfigError: a library for plots is missing.
    """
    space = domains(recipe, sweep)
    texts = {TABLE: table(sweep, space, trials)}
    if (text := best_yaml(recipe, sweep, trials)) is not None:
        texts[BEST] = text
    written = []
    for name, text in texts.items():
        disk.write_text(folder / name, text)
        written.append(folder / name)
    if measured(sweep, trials):
        disk.write_text(folder / REPORT, report(sweep, space, trials))
        draw_parallel(sweep, space, trials, folder / PARALLEL)
        draw_history(sweep, trials, folder / HISTORY)
        written += [folder / name for name in (REPORT, PARALLEL, HISTORY)]
    return written


def table(sweep: Sweep, space: Space, trials: Sequence[Trial]) -> str:
    """CSV, a line a trial, in the order in which they were proposed."""
    metrics = sorted({name for trial in trials for name in (trial.final or {})} - {sweep.metric})
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", "status", sweep.metric, *space, "steps", "seconds", *metrics, "error"])
    for trial in trials:
        value = trial.value(sweep.metric)
        row = [trial.number, trial.status, "" if value is None else value]
        row += [trial.point.get(key, "") for key in space]
        row += [trial.steps, round(trial.seconds, 3)]
        row += [(trial.final or {}).get(name, "") for name in metrics]
        rows.writerow([*row, trial.error])
    return text.getvalue()


def best_yaml(recipe: Recipe[Any], sweep: Sweep, trials: Sequence[Trial]) -> str | None:
    """The best configuration, as ``python -m train NAME --config`` reads it; ``None`` before
    any trial has a value.
    """
    found = best(list(trials), sweep.metric, sweep.mode)
    if found is None:
        return None
    config = trial_config(recipe, sweep, found.point)
    document: dict[str, Any] = {"recipe": recipe.name}
    if sweep.inputs:
        document["inputs"] = dict(sweep.inputs)
    document["config"] = config.model_dump(mode="json")
    comment = (
        f"# {sweep.metric} {found.value(sweep.metric)!r}: trial {found.number} of this sweep\n"
    )
    if found.turn:
        comment += "# Population based training: it had other values before; see trials.jsonl.\n"
    return comment + yaml.safe_dump(document, sort_keys=False)


def show(sweep: Sweep, trials: Sequence[Trial], stream: TextIO, *, most: int = 20) -> None:
    """The best trials on a terminal, the best first."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, width=None if stream.isatty() else 160)
    keys = list(sweep.space)
    shown = Table(*["trial", "status", sweep.metric, *keys, "steps", "time"], box=None)
    ranked = rank(sweep, trials)
    for trial in ranked[:most]:
        value = trial.value(sweep.metric)
        shown.add_row(
            str(trial.number),
            str(trial.status),
            "" if value is None else f"{value:.5g}",
            *[say(trial.point.get(key, "")) for key in keys],
            str(trial.steps),
            duration(trial.seconds),
        )
    console.print(shown)
    if len(ranked) > most:
        console.print(f"and {len(ranked) - most} more in {TABLE}")
    for trial in trials:
        if trial.error:
            console.print(f"trial {trial.number} failed: {trial.error}", style="red", markup=False)


def verdict(recipe: Recipe[Any], sweep: Sweep, trials: Sequence[Trial]) -> str | None:
    """Whether the best trial passes the recipe's gates; ``None`` if none ran to its end."""
    found = best(list(trials), sweep.metric, sweep.mode)
    if found is None or found.final is None:
        return None
    if failed := recipe.failed_gates(found.final):
        return f"trial {found.number} fails gates of {recipe.name}: {'; '.join(failed)}"
    return f"trial {found.number} passes the gates of {recipe.name}"


def rank(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Finished before stopped before the others, each from the best to the worst."""
    order = [Status.FINISHED, Status.STOPPED, Status.RUNNING, Status.WAITING, Status.FAILED]

    def key(trial: Trial) -> tuple[int, float, int]:
        value = trial.value(sweep.metric)
        if value is None or math.isnan(value):
            value = math.inf if sweep.mode == "min" else -math.inf
        badness = value if sweep.mode == "min" else -value
        return order.index(trial.status), badness, trial.number

    return sorted(trials, key=key)


def measured(sweep: Sweep, trials: Sequence[Trial]) -> list[tuple[Trial, float]]:
    """Trials with a finite value of the metric."""
    found = [(trial, trial.value(sweep.metric)) for trial in trials]
    return [(trial, value) for trial, value in found if value is not None and math.isfinite(value)]


def so_far(sweep: Sweep, values: Sequence[float]) -> list[float]:
    """The best of the values up to each."""
    found: list[float] = []
    for value in values:
        found.append(value if not found or better(value, found[-1], sweep.mode) else found[-1])
    return found


# Plots. A logarithmic range is drawn as its logarithm, choices as their places.


def axis(domain: Float | Int | Choice, values: Sequence[Value]) -> list[float]:
    """Where each value lies on the axis of its key."""
    if isinstance(domain, Choice):
        places = list(domain.values)
        return [float(places.index(value)) for value in values]
    numbers = [float(value) for value in values]
    return [math.log10(number) for number in numbers] if domain.log else numbers


def ticks(domain: Float | Int | Choice) -> tuple[list[float], list[str]]:
    """Places and words on the axis of a key."""
    if isinstance(domain, Choice):
        return [float(place) for place in range(len(domain.values))], list(map(say, domain.values))
    low, high = axis(domain, [domain.low, domain.high])
    places = [low + (high - low) * share / 4 for share in range(5)] if high > low else [low]
    return places, [say(10**place if domain.log else place) for place in places]


def report(sweep: Sweep, space: Space, trials: Sequence[Trial]) -> str:
    """Both plots in one page that needs no network: plotly is in it.

    Raises:
        ConfigError: plotly is missing.
    """
    try:
        import plotly.graph_objects as plotly
    except ImportError:
        raise ConfigError("Plots need plotly: pip install 'frontier-run[tune]'.") from None
    found = measured(sweep, trials)
    values = [value for _, value in found]
    dimensions = []
    for key, domain in space.items():
        places, words = ticks(domain)
        lie = axis(domain, [trial.point[key] for trial, _ in found])
        dimensions.append(
            {"label": key, "values": lie, "range": [places[0], places[-1] or 1e-9]}
            | {"tickvals": places, "ticktext": words}
        )
    dimensions.append({"label": sweep.metric, "values": values})
    colours = "Viridis" if sweep.mode == "max" else "Viridis_r"
    parallel = plotly.Figure(
        plotly.Parcoords(
            line={"color": values, "colorscale": colours, "showscale": True},
            dimensions=dimensions,
        )
    )
    parallel.update_layout(title="Every trial: its values and what came of them", height=480)
    history = plotly.Figure()
    for status in (Status.FINISHED, Status.STOPPED):
        of_it = [(trial, value) for trial, value in found if trial.status is status]
        history.add_scatter(
            x=[trial.number for trial, _ in of_it],
            y=[value for _, value in of_it],
            mode="markers",
            name=str(status),
            text=[_words(trial.point) for trial, _ in of_it],
        )
    history.add_scatter(
        x=[trial.number for trial, _ in found],
        y=so_far(sweep, values),
        mode="lines",
        line={"shape": "hv"},
        name="best so far",
    )
    history.update_layout(
        title="How it was found", xaxis_title="trial", yaxis_title=sweep.metric, height=480
    )
    title = html.escape(f"Sweep of {sweep.recipe}: {sweep.metric} ({sweep.mode})")
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=first, config={"displaylogo": False})
        for first, figure in ((True, parallel), (False, history))
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'</head>\n<body style="font-family: sans-serif"><h1>{title}</h1>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def draw_parallel(sweep: Sweep, space: Space, trials: Sequence[Trial], path: Path) -> None:
    """One line a trial over one axis a key, coloured by the metric."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    found = measured(sweep, trials)
    values = [value for _, value in found]
    shade: Any = ScalarMappable(
        Normalize(min(values), max(values)),
        colormaps["viridis" if sweep.mode == "max" else "viridis_r"],
    )
    figure = Figure(figsize=(2.2 + 1.6 * len(space), 4.2), layout="constrained")
    axes = figure.add_subplot()
    heights = []
    for place, (key, domain) in enumerate(space.items()):
        marks, words = ticks(domain)
        low, wide = marks[0], (marks[-1] - marks[0]) or 1.0
        heights.append(
            [(lie - low) / wide for lie in axis(domain, [trial.point[key] for trial, _ in found])]
        )
        axes.axvline(place, color="0.6", linewidth=0.8)
        for mark, word in zip(marks, words, strict=True):
            axes.annotate(word, (place, (mark - low) / wide), fontsize=7, color="0.3")
    order = sorted(range(len(found)), key=lambda i: values[i], reverse=sweep.mode == "min")
    for i in order:  # the best on top
        line = [height[i] for height in heights]
        axes.plot(range(len(line)), line, color=shade.to_rgba(values[i]), marker="o", markersize=3)
    axes.set_xticks(range(len(space)), list(space))
    axes.set_yticks([])
    axes.set_ylim(-0.03, 1.06)  # or the words at the ends are cut off
    axes.set_title(f"{sweep.recipe}: {len(found)} trials")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    figure.colorbar(shade, ax=axes, label=sweep.metric)
    figure.savefig(path, dpi=100)


def draw_history(sweep: Sweep, trials: Sequence[Trial], path: Path) -> None:
    """Values by trial, and the best so far."""
    from matplotlib.figure import Figure

    found = measured(sweep, trials)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for status, marker in ((Status.FINISHED, "o"), (Status.STOPPED, "x")):
        of_it = [(trial.number, value) for trial, value in found if trial.status is status]
        if of_it:
            axes.plot(*zip(*of_it, strict=True), marker, label=str(status), markersize=4)
    numbers = [trial.number for trial, _ in found]
    line = so_far(sweep, [value for _, value in found])
    axes.step(numbers, line, where="post", label="best so far", linewidth=1.2)
    axes.set(xlabel="trial", ylabel=sweep.metric, title=sweep.recipe)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def say(value: Any) -> str:
    """Short, for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(point: Mapping[str, Value]) -> str:
    return ", ".join(f"{key}={say(value)}" for key, value in point.items())
