"""What a person may say about a sweep: defaults of the recipe, changes, and helpful refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from models.errors import ConfigError
from tests.tune.hill import RECIPE, Hill
from train.discover import find
from train.space import Choice, Float, Int
from tune import space as spaces
from tune.config import (
    RESOLVED,
    Asha,
    Median,
    domains,
    load_yaml,
    make_searcher,
    read,
    read_resolved,
    resolve,
    trial_config,
    watched,
)
from tune.search import Kind

SWEEPS = Path(__file__).parents[2] / "tune" / "sweeps"


def test_what_is_left_open_comes_from_the_recipe() -> None:
    sweep = resolve(RECIPE, [])
    assert domains(RECIPE, sweep) == RECIPE.space
    assert (sweep.metric, sweep.mode, sweep.trials) == ("height", "max", 20)
    assert watched(sweep) == ("height", "max")


def test_a_later_document_changes_an_earlier_one_key_by_key() -> None:
    file = {"scheduler": {"kind": "asha", "first": 5}, "config": {"rope": {"length": 3}}}
    options = {
        "scheduler": {"reduction": 2},
        "config": {"rope": {"strong": False}},
        "space": {"pace": {"low": 0.2}, "boots": None, "steps": [5, 10]},
    }
    sweep = resolve(RECIPE, [file, options])
    assert sweep.scheduler == Asha(kind="asha", first=5, reduction=2)
    assert sweep.config == {"rope": {"length": 3, "strong": False}}
    assert domains(RECIPE, sweep) == {
        "pace": Float(low=0.2, high=1.0),
        "rope.length": Int(low=1, high=8, log=True),
        "steps": Choice((5, 10)),
    }


def test_another_kind_starts_from_its_own_defaults() -> None:
    asha = {"scheduler": {"kind": "asha", "first": 5}}
    assert resolve(RECIPE, [asha, {"scheduler": "median"}]).scheduler == Median(kind="median")
    assert resolve(RECIPE, [{"scheduler": "asha"}, asha]).scheduler == Asha(kind="asha", first=5)
    ranges = {"space": {"boots": ["a"]}}, {"space": {"pace": [0.1, 0.2]}}
    again = {"space": {"pace": {"low": 0.3, "high": 0.4}}}
    assert domains(RECIPE, resolve(RECIPE, [*ranges, again]))["pace"] == Float(low=0.3, high=0.4)


def test_a_section_that_may_be_missing_has_keys_too() -> None:
    sweep = resolve(RECIPE, [{"space": {"guide.length": {"low": 1, "high": 3}}}])
    assert domains(RECIPE, sweep)["guide.length"] == Int(low=1, high=3)
    config = trial_config(RECIPE, sweep, {"guide.length": 2, "pace": 0.3})
    assert isinstance(config, Hill)
    assert config.guide is not None
    assert (config.guide.length, config.guide.strong, config.pace) == (2, True, 0.3)


REFUSED: list[tuple[Mapping[str, Any], str]] = [
    ({"space": {"pase": [0.1]}}, r"unknown key 'pase'; did you mean 'pace'\?.*rope\.length"),
    ({"space": {"pace": [0.5, 2.0]}}, r"pace: .*less than or equal to 1 \(given: 2\.0\)"),
    ({"space": {"pace": {"low": 1.0, "high": 0.1}}}, r"space\.pace: low \(1\.0\) is above"),
    ({"space": {"pace": {"low": 0, "high": 1, "log": True}}}, "starts above 0"),
    ({"space": {"pace": {"low": 0, "hihg": 1}}}, r"space\.pace: expected a list of values"),
    ({"space": {"pace": 0.3}}, r"space\.pace: expected a list of values.*given: 0\.3"),
    ({"space": {"pace": []}}, "one value at least"),
    ({"space": {"boots": {"low": 1, "high": 2}}}, "takes no numbers; list its values"),
    ({"space": {"steps": {"low": 1, "high": 2.5}}}, "takes integers"),
    ({"space": {"pace": None, "boots": None, "rope.length": None}}, "has no space of its own"),
    ({"space": 3}, "space: .*dictionary"),
    ({"config": {"stepz": 3}}, "unknown key 'stepz'; did you mean 'steps'"),
    ({"config": {"rope": {"lenght": 3}}}, "unknown key 'lenght'; did you mean 'length'"),
    ({"trails": 3}, "unknown key 'trails'; did you mean 'trials'"),
    ({"trials": 0}, r"trials: .*greater than or equal to 1 \(given: 0\)"),
    ({"scheduler": "ahsa"}, "'ahsa' .*'none', 'asha', 'median', 'pbt'"),
    ({"scheduler": {"kind": "asha", "frist": 3}}, "unknown key 'frist'; did you mean 'first'"),
    ({"search": "bayes"}, "'random', 'grid', 'tpe' or 'gp'"),
    ({"metric": "speed"}, r"its gates \(height\) do not tell the mode"),
    ({"scheduler": "pbt", "search": "gp"}, "pbt searches itself"),
    ({"scheduler": "pbt", "workers": 2}, "pbt takes trials of one process; leave out workers"),
    ({"search": "grid", "trials": 3}, "grid has 50 points"),
    ({"recipe": "valley"}, "for 'valley', not for 'hill'"),
]


@pytest.mark.parametrize(("document", "told"), REFUSED, ids=[told[:24] for _, told in REFUSED])
def test_mistakes_are_named_with_what_would_be_right(
    document: Mapping[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(RECIPE, [document])


def test_a_recipe_without_gates_needs_a_metric() -> None:
    recipe = replace(RECIPE, gates={})
    with pytest.raises(ConfigError, match=r"its gates \(none\) do not tell the metric"):
        resolve(recipe, [])
    assert resolve(recipe, [{"metric": "steps", "mode": "min"}]).mode == "min"


def test_the_number_of_trials_of_a_grid_is_its_size() -> None:
    grid = {"search": {"kind": "grid", "points": 3}, "space": {"rope.length": [1, 2, 4, 8]}}
    assert resolve(RECIPE, [grid]).trials == 3 * 2 * 4


def test_numbers_are_read_as_people_write_them() -> None:
    assert load_yaml("[1e-4, 2E3, -1.5e+2, 3, 1.0, 1e, e3, 0x10]") == [
        *(1e-4, 2e3, -1.5e2, 3, 1.0, "1e", "e3", 16)
    ]


def test_a_resolved_sweep_is_read_back_as_it_was(tmp_path: Path) -> None:
    import yaml

    assert read_resolved(tmp_path) is None
    document = {"scheduler": {"kind": "median", "after": 30}, "space": {"boots": ["a", "b"]}}
    sweep = resolve(RECIPE, [document])
    (tmp_path / RESOLVED).write_text(yaml.safe_dump(sweep.model_dump(mode="json")))
    assert read_resolved(tmp_path) == sweep
    assert domains(RECIPE, sweep) == spaces.parse("hill", Hill, spaces.dump(domains(RECIPE, sweep)))
    (tmp_path / RESOLVED).write_text("recipe: hill\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_resolved(tmp_path)


def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected keys and values, found list"):
        read(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError, match="not YAML"):
        read(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("")
    assert read(tmp_path / "c.yaml") == {}


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_that_are_there_to_start_from_are_whole(path: Path) -> None:
    document = read(path)
    recipe = find(document["recipe"])
    sweep = resolve(recipe, [document])
    assert sweep.metric == next(iter(recipe.gates))
    assert make_searcher(recipe, sweep).ask() is not None


def test_there_is_one_for_every_searcher_and_scheduler() -> None:
    sweeps = [resolve(find(each["recipe"]), [each]) for each in map(read, SWEEPS.glob("*.yaml"))]
    assert {sweep.search.kind for sweep in sweeps} == set(get_args(Kind))
    assert {sweep.scheduler.kind for sweep in sweeps} == {"none", "asha", "median", "pbt"}
