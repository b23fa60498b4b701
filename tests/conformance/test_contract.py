"""What every recipe promises, as far as it can be seen without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from models import artifact
from tests.conformance.conftest import RECIPES, answer, rehearse
from train.config import keys, sections
from train.discover import discover
from train.recipe import Config, Recipe
from train.space import Choice, Domain, Float, Int


def test_no_recipe_is_broken() -> None:
    assert discover().broken == {}
    assert RECIPES


def test_importing_a_recipe_is_cheap(tmp_path: Path) -> None:
    brought = answer(rehearse(tmp_path, "imports"))
    assert not {name: heavy for name, heavy in brought.items() if heavy}, (
        "import these in functions"
    )


def test_the_configuration_goes_through_a_file_and_back(recipe: Recipe[Any]) -> None:
    for config in (recipe.smoke, *_default(recipe)):
        text = json.dumps(config.model_dump(mode="json"), allow_nan=False)
        assert recipe.config.model_validate(json.loads(text)) == config
    assert isinstance(recipe.smoke, recipe.config)
    assert issubclass(recipe.config, Config)


def test_unknown_keys_are_errors_at_every_depth(recipe: Recipe[Any]) -> None:
    for path in _sections(recipe.smoke):
        tree = recipe.smoke.model_dump(mode="json")
        inner = tree
        for key in path:
            inner = inner[key]
        inner["no_such_key"] = 1
        with pytest.raises(ValidationError, match="no_such_key"):
            recipe.config.model_validate(tree)


def test_it_says_what_it_is(recipe: Recipe[Any]) -> None:
    assert recipe.summary
    assert "\n" not in recipe.summary
    assert recipe.kind
    assert recipe.gates, "what must its metrics reach, and what was that bound taken from?"
    assert recipe.smoke_gates, "what does even a smoke run reach?"
    for gate in (*recipe.gates.values(), *recipe.smoke_gates.values()):
        assert gate.baseline
    assert recipe.licence or recipe.bases


def test_its_sweep_is_of_keys_that_exist(recipe: Recipe[Any]) -> None:
    known = {key.name for key in keys(recipe.config, recipe.smoke.model_dump(mode="json"))}
    assert recipe.space.keys() <= known
    for key, domain in recipe.space.items():
        for value in _ends(domain):
            tree = recipe.smoke.model_dump(mode="json")
            *path, last = key.split(".")
            inner = tree
            for part in path:
                inner = inner[part]
            inner[last] = value
            recipe.config.model_validate(tree)


def test_its_loader_can_be_imported_without_training(recipe: Recipe[Any]) -> None:
    name = recipe.loader
    if name is None:
        assert not recipe.sample
        pytest.skip("predicts nothing")
    assert name.startswith(f"{artifact.LOADERS}.")
    assert recipe.sample, "an input that it predicts for"
    json.dumps(list(recipe.sample), allow_nan=False)


def _default(recipe: Recipe[Any]) -> list[Config]:
    try:
        return [recipe.config()]
    except ValidationError:  # it has keys without a default
        return []


def _sections(config: BaseModel, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel) and sections(info.annotation):
            found += _sections(value, (*path, name))
    return found


def _ends(domain: Domain) -> list[Any]:
    assert isinstance(domain, get_args(Domain))
    match domain:
        case Float() | Int():
            assert domain.low < domain.high
            return [domain.low, domain.high]
        case Choice():
            assert len(set(domain.values)) == len(domain.values) > 1
            return list(domain.values)
