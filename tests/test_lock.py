"""``requirements.lock`` is what ``pyproject.toml`` asks for, exactly and for everyone."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HOW = "run scripts/lock"


def locked() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def declared() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from map(Requirement, project["dependencies"])
    for extra in project["optional-dependencies"].values():
        yield from map(Requirement, extra)


LOCKED = locked()
GPU = ("nvidia", "cuda", "triton")
"""torch's own affair, and of one machine."""


@pytest.mark.parametrize("requirement", list(declared()), ids=str)
def test_what_is_declared_is_locked(requirement: Requirement) -> None:
    found = LOCKED.get(canonicalize_name(requirement.name))
    assert found, f"{requirement.name} is not locked; {HOW}"
    version = str(found.specifier).removeprefix("==")
    assert requirement.specifier.contains(version, prereleases=True), (
        f"{found} is locked, {requirement} is declared; {HOW}"
    )


def test_versions_are_exact_and_of_no_one_machine() -> None:
    wrong = [
        str(requirement)
        for requirement in LOCKED.values()
        if [specifier.operator for specifier in requirement.specifier] != ["=="]
        or "+" in str(requirement.specifier)  # a local version is found on one machine only
        or requirement.url
        or requirement.name.startswith(GPU)
    ]
    assert not wrong


HERE = sorted(name for name, r in LOCKED.items() if r.marker is None or r.marker.evaluate())


@pytest.mark.parametrize("name", HERE)
def test_what_it_needs_is_locked_too(name: str) -> None:
    """Or pip would choose a version by itself."""
    needs = [Requirement(line) for line in metadata.requires(name) or ()]
    missing = [
        str(need)
        for need in needs
        if (need.marker is None or need.marker.evaluate({"extra": ""}))
        and not need.name.startswith(GPU)
        and canonicalize_name(need.name) not in LOCKED
    ]
    assert not missing, HOW
