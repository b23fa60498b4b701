"""``python -m tune``: what it lists, what it plans from file and options, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.tune.conftest import Open
from tests.tune.hill import RECIPE
from tune import __main__ as cli
from tune.config import RESOLVED, Asha, resolve
from tune.course import FINAL, Course


@pytest.fixture(autouse=True)
def only_the_hill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from train.discover import Found

    found = Found(recipes={"hill": RECIPE}, broken={"train.recipes.bog": "SyntaxError: mud"})
    monkeypatch.setattr("train.discover.discover", lambda: found)
    monkeypatch.setattr(cli, "discover", lambda: found)
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))


def planned(*words: str) -> tuple[dict[str, object], Path]:
    _, sweep, folder = cli._planned(cli.parser().parse_args(words))
    return sweep.model_dump(), folder


def test_options_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "recipe: hill\ntrials: 30\nscheduler: asha\nconfig: {steps: 5, rope: {length: 3}}\n"
        "space: {pace: {low: 1e-1, high: 0.9}}\n"
    )
    sweep, folder = planned(
        *("--config", str(file), "--trials", "7", "--set", "rope.strong=false"),
        *("--space", "pace={low: 2e-1}", "--space", "boots=null", "--seed", "3"),
        *("--scheduler", "{first: 5}", "--search", "random", "--max-concurrent", "2"),
    )
    assert sweep["config"] == {"steps": 5, "rope": {"length": 3, "strong": False}}
    space = sweep["space"]
    assert isinstance(space, dict)
    assert space.keys() == {"pace", "rope.length"}
    assert space["pace"] == {"low": 0.2, "high": 0.9, "log": False}
    assert sweep["scheduler"] == Asha(kind="asha", first=5).model_dump()
    assert (sweep["trials"], sweep["seed"], sweep["max_concurrent"]) == (7, 3, 2)
    assert folder.parent == tmp_path / "home" / "runs" / "sweeps" / "hill"


def test_a_smoke_sweep_starts_from_the_smoke_run() -> None:
    sweep, _ = planned("hill", "--smoke", "--set", "boots=nailed")
    assert sweep["config"] == {"steps": 2, "boots": "nailed"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which recipe? Known: hill"),
        (["hil"], "did you mean 'hill'"),
        (["hill", "--set", "stepz=3"], "unknown key 'stepz'"),
        (["hill", "--set", "steps"], "expected key=value"),
        (["hill", "--space", "pace"], "--space pace: expected key=value"),
        (["hill", "--space", "pase=[1]"], "unknown key 'pase'"),
        (["hill", "--trials", "none"], "trials"),
        (["hill", "--input", "model=here"], "unknown input 'model'"),
        (["hill", "--metric", "speed"], "do not tell the mode"),
        (["--resume", "nowhere"], "there is no sweep in this folder"),
        (["--show", "hil"], "did you mean 'hill'"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert told in capsys.readouterr().err


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    said = capsys.readouterr()
    assert "hill  pace, boots, rope.length" in said.out
    assert "bog cannot be used: SyntaxError: mud" in said.err
    assert cli.main(["--show", "hill"]) == 0
    said = capsys.readouterr()
    assert "metric: height (max), gate >= 0.9" in said.out
    assert "may vary: seed, pace, boots, rope.length, rope.strong, guide.length" in said.out


def test_a_sweep_in_its_folder_is_shown_and_goes_on_only_as_it_was(
    journal: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = resolve(RECIPE, [{"trials": 4, "search": "random"}])
    (tmp_path / RESOLVED).write_text(yaml.safe_dump(sweep.model_dump(mode="json")))
    course = Course(RECIPE, sweep, journal(tmp_path))
    trial = course.assign(limit=None)
    assert trial is not None
    course.started(0)
    course.told(trial, {FINAL: {"height": 0.75}})
    assert cli.main(["--show", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "finished" in said
    assert "# height 0.75: trial 0 of this sweep" in said

    words = ["--resume", str(tmp_path)]
    _, resumed, folder = cli._resumed(cli.parser().parse_args([*words, "--trials", "9"]))
    assert resumed == sweep.model_copy(update={"trials": 9})
    assert folder == tmp_path
    assert cli.main([*words, "--set", "steps=3"]) == 2
    assert "--set cannot be changed with --resume" in capsys.readouterr().err
    assert cli.main([*words, "valley"]) == 2
    assert "is a sweep of hill" in capsys.readouterr().err


def test_another_sweep_is_not_mixed_into_a_folder(tmp_path: Path) -> None:
    from models.errors import ConfigError
    from tune.sweep import begin

    sweep = resolve(RECIPE, [{"trials": 4}])
    begin(sweep, tmp_path)
    begin(sweep.model_copy(update={"trials": 9, "time_budget_s": 3.0}), tmp_path)
    with pytest.raises(ConfigError, match="holds another sweep: its seed is 0, not 1"):
        begin(sweep.model_copy(update={"seed": 1}), tmp_path)
