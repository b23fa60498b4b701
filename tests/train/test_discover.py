"""Recipes are found, and a broken one does not hide the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import ConfigError
from tests.train.conftest import TOYS, environment
from train.discover import discover, find, unknown

LOOK = "from train.discover import discover; found = discover(); "


OWN_LOADER = """
from dataclasses import replace
from train.recipes import walk

def load(folder):
    return None

RECIPE = replace(walk.RECIPE, name="own", load=load)
"""


def look(tmp_path: Path, code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    paths = ":".join(map(str, folders))
    return subprocess.run(
        [sys.executable, "-c", LOOK + code],
        env={**environment(tmp_path), "FRONTIER_RECIPES": paths},
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_recipes_of_this_project_all_work() -> None:
    found = discover()
    assert not found.broken
    assert "vision" in found.recipes
    assert list(found.recipes) == sorted(found.recipes)
    assert find("vision").name == "vision"


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'visoin'; did you mean 'vision'\?"):
        find("visoin")
    assert unknown("key", "zzz", []) == "unknown key 'zzz'. Known: none"


def test_broken_recipes_are_named_and_others_found(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("import no_such_module")
    (tmp_path / "half.py").write_text("def f(:")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "other.py").write_text("RECIPE = 3")
    (tmp_path / "twin.py").write_text("from train.recipes.walk import RECIPE")
    (tmp_path / "own.py").write_text(OWN_LOADER)
    (tmp_path / "_helper.py").write_text("raise ValueError")
    code = "print(*[f'{k}: {v}' for k, v in found.broken.items()], *found.recipes, sep='\\n')"
    said = look(tmp_path, code, tmp_path, TOYS).stdout
    assert "train.recipes.wrong: ModuleNotFoundError: No module named 'no_such_module'" in said
    assert "train.recipes.half: SyntaxError" in said
    assert "train.recipes.empty: AttributeError" in said
    assert "train.recipes.other: TypeError: RECIPE is int" in said
    assert "another module has a recipe 'walk', too" in said
    assert "train.recipes.own: ConfigError: own: its loader is 'train.recipes.own:load'" in said
    assert "_helper" not in said
    assert {"vision", "walk"} <= set(said.splitlines())


def test_a_broken_recipe_says_why_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("import no_such_module")
    code = """
from train.discover import find
try:
    find("wrong")
except Exception as error:
    print(error)
"""
    said = look(tmp_path, code, tmp_path).stdout
    assert said.startswith("train.recipes.wrong cannot be used: ModuleNotFoundError: No module")


def test_a_worker_finds_recipes_where_its_driver_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the driver was given a relative path: a worker's folder is another one."""
    from train import launch, recipes

    ours = recipes.__path__[0]
    monkeypatch.setenv("FRONTIER_RECIPES", "mine")
    monkeypatch.setattr(recipes, "__path__", [ours, str(tmp_path / "mine")])
    told = launch._environ()
    monkeypatch.setattr(recipes, "__path__", [ours])
    launch._adopt(told)
    launch._adopt(told)
    assert recipes.__path__ == [ours, str(tmp_path / "mine")]
