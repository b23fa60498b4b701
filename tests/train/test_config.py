"""What a person types, and what they are told when it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from models.errors import ConfigError
from train import config
from train.config import Experiment, Launch, keys, merged, validated, with_settings


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Adam(Section):
    kind: Literal["adam"] = "adam"
    beta: float = 0.9


class Sgd(Section):
    kind: Literal["sgd"] = "sgd"
    momentum: float = 0.0


class Deep(Section):
    rate: float = Field(default=0.1, gt=0)
    """How fast."""


class Whole(Section):
    deep: Deep = Deep()
    optimiser: Annotated[Adam | Sgd, Field(discriminator="kind")] = Adam()
    steps: int = Field(ge=1)
    """How
    far."""
    names: tuple[str, ...] = ("a",)
    limit: int | None = None


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "whole: steps: Field required"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1 (given: 0)"),
        ({"steps": 1, "stesp": 2}, "unknown key 'stesp'; did you mean 'steps'? Known: deep, "),
        ({"steps": 1, "deep": {"speed": 1}}, "unknown key 'speed'. Known: rate (in deep)"),
        (
            {"steps": 1, "optimiser": {"kind": "sgd", "beta": 1}},
            "unknown key 'optimiser.sgd.beta'",
        ),
        ({"steps": "x", "deep": {"rate": -1}}, "; steps: Input should be a valid integer"),
    ],
)
def test_mistakes_are_told_in_one_line(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as told:
        validated(Whole, tree, called="whole")
    assert says in told.value.message
    assert "\n" not in told.value.message


def test_settings() -> None:
    tree = {"a": 1, "b": {"c": 2}}
    said = with_settings(
        tree, ["a=2", "b.d=x", "e.f.g=[1, 2]", "h=", "i=1e-3", "j=a: b: c", "k=a=b"]
    )
    assert said == {
        "a": 2,
        "b": {"c": 2, "d": "x"},
        "e": {"f": {"g": [1, 2]}},
        "h": None,
        "i": "1e-3",  # YAML 1.1; a float field takes it
        "j": "a: b: c",
        "k": "a=b",
    }
    assert tree == {"a": 1, "b": {"c": 2}}


def test_merging_goes_all_the_way_down() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merged(base, {"a": {"c": {"e": 4}}, "d": {"f": 5}}) == {
        "a": {"b": 1, "c": {"e": 4}},
        "d": {"f": 5},
    }
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


def test_every_key_is_shown_with_type_default_and_meaning() -> None:
    defaults = Whole(steps=1).model_dump(mode="json")
    del defaults["steps"]
    shown = {row.name: row[1:] for row in keys(Whole, defaults)}
    assert shown["deep.rate"] == ("float > 0", "0.1", "How fast.")
    assert shown["steps"] == ("int >= 1", "(required)", "How far.")
    assert shown["names"] == ("list[text]", "[a]", "")
    assert shown["limit"] == ("int | null", "null", "")
    assert shown["optimiser"][:2] == ("Adam | Sgd", "{beta: 0.9, kind: adam}")


def test_the_defaults_of_a_file() -> None:
    launch = Experiment().launch()
    assert launch == Launch()
    assert Launch.model_validate(launch.model_dump(mode="json")) == launch


@pytest.mark.parametrize("workers", [0, 1, 3, (1, 4)])
def test_numbers_of_workers_survive_a_file(workers: Any) -> None:
    launch = Launch(workers=workers)
    assert Launch.model_validate(launch.model_dump(mode="json")).workers == workers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("- a", "is list, expected keys and values"),
        ("recpie: a", "unknown key 'recpie'; did you mean 'recipe'?"),
        ("stesp: 2", "unknown key 'stesp'; did you mean 'steps'?"),
        ("steps: 2\nconfig: {steps: 3}", "steps stands both under config and beside it"),
        ("steps: 2\nconfig: 3", "config: Input should be a valid dictionary"),
        ("tracking: {wandb: {mode: sometimes}}", "tracking.wandb.mode: Input should be"),
        ("workers: -1", "workers"),
        ("workers: [3, 2]", "3 is more than 2"),
    ],
)
def test_a_file_that_is_wrong(text: str | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as told:
        config.experiment(config.read(file), Whole, called=str(file))
    assert says in told.value.message
    assert told.value.message.startswith(str(file))
    assert "\n" not in told.value.message


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text("")
    assert config.experiment(config.read(file), Whole, called="") == Experiment()


def test_keys_of_the_recipe_may_stand_beside_the_others() -> None:
    beside = {"run_name": "a", "steps": 3, "deep": {"rate": 0.5}, "config": {"limit": 7}}
    below = {"run_name": "a", "config": {"steps": 3, "deep": {"rate": 0.5}, "limit": 7}}
    made = config.experiment(beside, Whole, called="")
    assert made == config.experiment(below, Whole, called="")
    assert made.config == below["config"]
