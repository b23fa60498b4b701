"""Table, best configuration and plots of a sweep."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tune.conftest import Open
from tests.tune.hill import RECIPE, Hill, Rope
from train import config as experiments
from tune import progress, results
from tune.config import Sweep, domains, resolve
from tune.course import ERROR, FINAL, REPORT, Course
from tune.journal import Trial


@pytest.fixture
def swept(journal: Open, tmp_path: Path) -> tuple[Sweep, list[Trial]]:
    """Four finished, one stopped, one failed and one that diverged."""
    document = {"trials": 8, "search": "random", "config": {"rope": {"strong": False}}}
    sweep = resolve(RECIPE, [document])
    course = Course(RECIPE, sweep, journal(tmp_path))
    ends: list[dict[str, Any]] = [{FINAL: {"height": value}} for value in (0.5, 0.9, 0.7, 0.2)]
    ends += [{}, {ERROR: "fell, [badly]"}, {FINAL: {"height": float("nan")}}]
    for end in ends:
        trial = course.assign(limit=None)
        assert trial is not None
        course.started(trial.number)
        course.told(trial, {REPORT: {"step": 3, "total": 10, "metrics": {"height": 0.1}}})
        course.told(trial, end)
        course.completed(trial.number)
    return sweep, course.trials


def test_the_best_configuration_is_what_train_reads(
    swept: tuple[Sweep, list[Trial]], tmp_path: Path
) -> None:
    sweep, trials = swept
    text = results.best_yaml(RECIPE, sweep, trials)
    assert text is not None
    assert text.startswith("# height 0.9: trial 1 ")
    (tmp_path / "best.yaml").write_text(text)
    tree = experiments.read(tmp_path / "best.yaml")
    experiment = experiments.experiment(tree, Hill, called="best.yaml")
    assert experiment.recipe == "hill"
    config = experiments.validated(Hill, experiment.config, called="best.yaml")
    point = trials[1].point
    assert config == Hill.model_validate(
        {
            "pace": point["pace"],
            "boots": point["boots"],
            "rope": Rope(length=int(point["rope.length"]), strong=False),
        }
    )
    assert results.best_yaml(RECIPE, sweep, trials[4:5]) is not None  # a stopped one, for want
    assert results.best_yaml(RECIPE, sweep, trials[5:]) is None


def test_the_table_has_a_line_a_trial(swept: tuple[Sweep, list[Trial]]) -> None:
    sweep, trials = swept
    rows = list(csv.DictReader(io.StringIO(results.table(sweep, domains(RECIPE, sweep), trials))))
    assert [row["status"] for row in rows] == [
        *["finished"] * 4, "stopped", "failed", "finished"
    ]  # fmt: skip
    assert [row["height"] for row in rows] == ["0.5", "0.9", "0.7", "0.2", "0.1", "0.1", "nan"]
    assert [float(row["pace"]) for row in rows] == [trial.point["pace"] for trial in trials]
    assert rows[5]["error"] == "fell, [badly]"
    shown = io.StringIO()
    results.show(sweep, trials, shown, most=3)
    lines = shown.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "0"]
    assert "and 4 more in trials.csv" in lines[4]
    assert "trial 5 failed: fell, [badly]" in lines[5]


def test_the_best_trial_is_held_against_the_gates(swept: tuple[Sweep, list[Trial]]) -> None:
    sweep, trials = swept
    assert results.verdict(RECIPE, sweep, trials) == "trial 1 passes the gates of hill"
    assert results.verdict(RECIPE, sweep, [trials[0], trials[2]]) == (
        "trial 2 fails gates of hill: height is 0.7, expected >= 0.9 (the valley: 0)"
    )
    assert results.verdict(RECIPE, sweep, trials[4:6]) is None, "none ran to its end"


def test_plots_need_no_network(swept: tuple[Sweep, list[Trial]], tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    sweep, trials = swept
    written = {path.name for path in results.write(RECIPE, sweep, tmp_path, trials)}
    assert written == {"trials.csv", "best.yaml", "report.html", "parallel.png", "history.png"}
    for name in ("parallel.png", "history.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    assert page.count("Plotly.newPlot(") >= 2
    assert "rope.length" in page
    assert "best so far" in page


def test_nothing_is_drawn_before_anything_is_measured(tmp_path: Path) -> None:
    sweep = resolve(RECIPE, [])
    assert [path.name for path in results.write(RECIPE, sweep, tmp_path, [])] == ["trials.csv"]


def test_axes_keep_the_order_of_their_domain() -> None:
    space = RECIPE.space
    assert results.axis(space["boots"], ["nailed", "leather"]) == [1.0, 0.0]
    assert results.axis(space["rope.length"], [1, 8]) == pytest.approx([0.0, 0.90309], abs=1e-4)
    assert results.ticks(space["boots"]) == ([0.0, 1.0], ["leather", "nailed"])
    assert results.ticks(space["pace"])[1][0] == "0.1"
    assert results.so_far(resolve(RECIPE, []), [0.2, 0.1, 0.3]) == [0.2, 0.2, 0.3]


def test_progress_says_what_runs_what_is_best_and_how_long_it_takes(
    journal: Open, tmp_path: Path
) -> None:
    now = [0.0]
    sweep = resolve(RECIPE, [{"trials": 6, "search": "random"}])
    stream = io.StringIO()
    lines = progress.Lines(stream, every_s=5, clock=lambda: now[0])
    course = Course(RECIPE, sweep, journal(tmp_path, lambda: now[0]), watch=lines)
    first, second = course.assign(limit=None), course.assign(limit=None)
    assert first is not None
    assert second is not None
    course.started(0)
    course.started(1)
    now[0] = 10
    course.told(first, {FINAL: {"height": 0.25}})
    assert progress.seconds_left(course) == pytest.approx(40)  # four more, one at a time
    now[0] = 16
    course.completed(1)
    told = stream.getvalue().splitlines()
    assert told[0] == "0/6 trials: 1 running"
    assert told[1] == "1/6 trials: 1 running, best height 0.25 (trial 0), 0:40 left"
    assert told[2] == "2/6 trials: 1 stopped, best height 0.25 (trial 0), 0:52 left"
    assert progress.done(course) == 2
