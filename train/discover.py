"""Recipes by name: every module of ``train.recipes`` that exports ``RECIPE``."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from models.artifact import check_loader
from models.errors import ConfigError
from train import recipes as package
from train.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    recipes: Mapping[str, Recipe[Any]]
    """By name, in order."""
    broken: Mapping[str, str]
    """Modules that export no recipe → why. They do not hide the others."""


@cache
def discover() -> Found:
    recipes: dict[str, Recipe[Any]] = {}
    broken: dict[str, str] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_"):
            continue
        name = f"{package.__name__}.{module.name}"
        try:
            recipe = importlib.import_module(name).RECIPE
            if not isinstance(recipe, Recipe):
                raise TypeError(f"RECIPE is {type(recipe).__name__}, expected train.recipe.Recipe")
            if recipe.loader is not None:
                check_loader(recipe.loader, recipe.name)
            if recipe.name in recipes:
                raise ValueError(f"another module has a recipe {recipe.name!r}, too")
        except Exception as error:  # anything may go wrong in a file that somebody is writing
            broken[name] = f"{type(error).__name__}: {error}"
            sys.modules.pop(name, None)
        else:
            recipes[recipe.name] = recipe
    return Found(recipes=dict(sorted(recipes.items())), broken=broken)


def find(name: str) -> Recipe[Any]:
    """The recipe called ``name``.

    Raises:
        ConfigError: there is none; it says which there are.
    """
    found = discover()
    if name in found.recipes:
        return found.recipes[name]
    for module, why in found.broken.items():
        if name == module.rpartition(".")[2]:
            raise ConfigError(f"{module} cannot be used: {why}")
    raise ConfigError(unknown("recipe", name, found.recipes))


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """The sentence for a name or key that does not exist."""
    names = list(known)
    close = get_close_matches(given, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {given!r}{hint} Known: {', '.join(names) or 'none'}"
