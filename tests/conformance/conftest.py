"""Every recipe that is found, and its smoke run, made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from models.sources import default_cache
from train.discover import discover
from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = discover().recipes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take a ``recipe`` run for every one of them."""
    if "recipe" in metafunc.fixturenames:
        metafunc.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def rehearse(
    folder: Path, *words: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``rehearsal.py`` with a home, a working directory and temporary files of its own."""
    places = {name: folder / name for name in ("home", "here", "tmp")}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "tests.conformance.rehearsal", *words],
        cwd=places["here"],
        env={
            # torch.compile in another test of this process leaves its folder in the environment.
            **{k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"},
            "HOME": str(places["home"]),
            "TMPDIR": str(places["tmp"]),
            "FRONTIER_HOME": str(places["home"] / "frontier"),
            "FRONTIER_CACHE": str(default_cache()),
            "MPLCONFIGDIR": str(folder / "fonts"),  # a list that matplotlib makes once a machine
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": "",
            **(env or {}),
        },
        capture_output=True,
        text=True,
    )


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """What a rehearsal found out. A recipe that lacks a library is skipped."""
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if "ConfigError" in last and "needs pip install" in last:
            pytest.skip(last.partition(": ")[2])
        pytest.fail(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def once(folder: Path, *words: str, env: Mapping[str, str] | None = None) -> Any:
    """The answer of a rehearsal that all test processes share."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "done.json"
    with FileLock(f"{folder}.lock"):
        if not known.exists():
            done = rehearse(folder, *words, env=env)
            said = {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
            known.write_text(json.dumps(said))
    said = json.loads(known.read_text())
    return answer(subprocess.CompletedProcess((), said["code"], said["stdout"], said["stderr"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoke:
    """A smoke run that was made."""

    folder: Path
    """Holds ``out``, ``home``, ``here``, ``tmp``."""
    found: dict[str, Any]

    @property
    def artifact(self) -> Path:
        return self.folder / "out" / "artifact"


@dataclass(frozen=True, slots=True)
class Rehearsals:
    """Smoke runs by recipe; those that start from an artifact get one of a matching kind."""

    root: Path

    def smoke(self, recipe: Recipe[Any], called: str = "first", **env: str) -> Smoke:
        folder = self.root / recipe.name / called
        inputs = {kind: str(self.smoke(maker(kind)).artifact) for kind in recipe.inputs}
        words = ("smoke", recipe.name, str(folder / "out"), json.dumps(inputs))
        return Smoke(folder=folder, found=once(folder, *words, env=env))


def maker(kind: str) -> Recipe[Any]:
    """A recipe that makes an artifact of this kind, from nothing if there is one."""
    makers = [each for each in RECIPES.values() if each.kind == kind]
    if not makers:
        pytest.fail(f"no recipe makes an artifact of kind {kind!r}")
    return min(makers, key=lambda each: (len(each.inputs), each.name != "vision", each.name))


def several(sample: Any) -> list[Any]:
    """At least three, so that order can be seen where answers differ."""
    some = list(sample)
    return some * 3 if len(some) == 1 else some


def same(one: Any, other: Any) -> bool:
    """Equal, numbers to five digits: a batch of another size may be summed in another order."""
    if isinstance(one, float) or isinstance(other, float):
        return bool(one == pytest.approx(other, rel=1e-5, abs=1e-6))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.fixture(scope="session")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Rehearsals:
    base = tmp_path_factory.getbasetemp()
    return Rehearsals((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "rehearsals")
