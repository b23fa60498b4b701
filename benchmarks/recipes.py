"""Every system as a person trains it: default configuration, what it reaches, how long it takes.

``python -m benchmarks.recipes [NAME ...]``

Each is ``python -m train NAME``, in a process of its own. A recipe that starts from an artifact
gets the one that the last earlier recipe of this run has made. The process ends with 1 if a gate
did not pass.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Report, table
from models.errors import ConfigError
from train.discover import discover, find
from train.folder import RunFolder
from train.recipe import Recipe

HEAD = ("system", "gate", "reached", "expected", "", "seconds")


def ordered(recipes: Iterable[Recipe[Any]]) -> list[Recipe[Any]]:
    """Each after the makers of what it starts from.

    Raises:
        ConfigError: nobody here makes what one of them starts from.
    """
    waiting, made, order = list(recipes), set[str](), list[Recipe[Any]]()
    while waiting:
        ready = [recipe for recipe in waiting if made.issuperset(recipe.inputs)]
        if not ready:
            names = ", ".join(recipe.name for recipe in waiting)
            raise ConfigError(f"{names}: name the recipes that make their inputs, too")
        order += ready
        made.update(recipe.kind for recipe in ready)
        waiting = [recipe for recipe in waiting if recipe not in ready]
    return order


def train(recipe: Recipe[Any], out: Path, artifacts: dict[str, Path]) -> dict[str, Any]:
    """What ``result.json`` says; the artifact is added to ``artifacts`` by its kind.

    Raises:
        SystemExit: the run did not get as far as its gates.
    """
    command = [sys.executable, "-m", "train", recipe.name, "--out", str(out)]
    for kind in recipe.inputs:
        command += ["--input", f"{kind}={artifacts[kind]}"]
    subprocess.run(command, check=False)
    result = RunFolder(out).result()
    if result is None:
        raise SystemExit(f"{recipe.name} failed; see above")
    artifacts[recipe.kind] = out / "artifact"
    return result


def rows(recipe: Recipe[Any], result: dict[str, Any]) -> list[tuple[object, ...]]:
    """One a gate."""
    return [
        (
            "" if number else recipe.name,
            gate["metric"],
            "missing" if gate["value"] is None else f"{gate['value']:.4g}",
            gate["expected"],
            "passed" if gate["passed"] else "FAILED",
            "" if number else float(result["seconds"]),
        )
        for number, gate in enumerate(result["gates"])
    ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of recipes; default: all")
    names = parser.parse_args(words).names
    chosen = [find(name) for name in names] or list(discover().recipes.values())
    lines: list[tuple[object, ...]] = []
    artifacts: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in ordered(chosen):
            result = train(recipe, Path(folder) / recipe.name, artifacts)
            lines += rows(recipe, result)
    report = Report("recipes", "The systems: what each reaches with its default configuration")
    report.add(table(HEAD, lines))
    report.write()
    return 0 if all(line[4] == "passed" for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
