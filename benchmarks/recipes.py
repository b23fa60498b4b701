"""Every system as a person trains it: what it reaches, and how long it takes.

``python -m benchmarks.recipes [NAME | "NAME KEY=VALUE ..."] ...``

Each is ``python -m train NAME``, in a process of its own, with its default configuration but for
what is set. A recipe that starts from an artifact gets the one that the last earlier recipe of this
run has made. The process ends with 1 if a gate did not pass.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Report, table
from models.errors import ConfigError
from train.discover import discover, find
from train.folder import RunFolder
from train.recipe import Recipe

HEAD = ("system", "gate", "reached", "expected", "", "seconds")


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe, and what of its configuration is set."""

    recipe: Recipe[Any]
    changes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Run:
        """Of ``NAME KEY=VALUE ...``."""
        name, *changes = text.split()
        return cls(find(name), tuple(changes))

    def __str__(self) -> str:
        return " ".join([self.recipe.name, *self.changes])


def ordered(runs: Iterable[Run]) -> list[Run]:
    """Each after the makers of what it starts from.

    Raises:
        ConfigError: nobody here makes what one of them starts from.
    """
    waiting, made, order = list(runs), set[str](), list[Run]()
    while waiting:
        ready = [run for run in waiting if made.issuperset(run.recipe.inputs)]
        if not ready:
            names = ", ".join(run.recipe.name for run in waiting)
            raise ConfigError(f"{names}: name the recipes that make their inputs, too")
        order += ready
        made.update(run.recipe.kind for run in ready)
        waiting = [run for run in waiting if run not in ready]
    return order


def train(run: Run, out: Path, artifacts: dict[str, Path]) -> dict[str, Any]:
    """What ``result.json`` says; the artifact is added to ``artifacts`` by its kind.

    Raises:
        SystemExit: the run did not get as far as its gates.
    """
    recipe = run.recipe
    command = [sys.executable, "-m", "train", recipe.name, "--out", str(out)]
    for change in run.changes:
        command += ["--set", change]
    for kind in recipe.inputs:
        command += ["--input", f"{kind}={artifacts[kind]}"]
    subprocess.run(command, check=False)
    result = RunFolder(out).result()
    if result is None:
        raise SystemExit(f"{run} failed; see above")
    artifacts[recipe.kind] = out / "artifact"
    return result


def rows(run: Run, result: dict[str, Any]) -> list[tuple[object, ...]]:
    """One a gate."""
    return [
        (
            "" if number else str(run),
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
    told = "a recipe, and what is set; default: all recipes as they are"
    parser.add_argument("runs", nargs="*", metavar='NAME | "NAME KEY=VALUE ..."', help=told)
    given = [Run.parse(text) for text in parser.parse_args(words).runs]
    chosen = given or [Run(recipe) for recipe in discover().recipes.values()]
    lines: list[tuple[object, ...]] = []
    artifacts: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, run in enumerate(ordered(chosen)):
            result = train(run, Path(folder) / f"{number}-{run.recipe.name}", artifacts)
            lines += rows(run, result)
    report = Report("recipes", "The systems: what each reaches")
    report.add(table(HEAD, lines))
    report.write()
    return 0 if all(line[4] == "passed" for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
