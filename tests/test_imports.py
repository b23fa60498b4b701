"""Who may import whom: one arrow each way, and heavy libraries only where they work."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

LAYERS = {
    "state": set[str](),
    "models": {"state"},
    "train": {"state", "models"},
    "tune": {"state", "models", "train"},
    "deployments": {"state", "models"},
}
"""state ← models ← train ← tune, and models ← deployments: what each may import."""

SIBLINGS = LAYERS.keys() | {"benchmarks", "tests"}

RAY_EDGES = {
    "deployments/app.py": "binds deployments into the application that serve run deploys",
    "deployments/replicas.py": "the shells that make replicas of gateway and engines",
    "deployments/remote.py": "handles to other replicas behind our own contracts",
    "deployments/observability/ray_*.py": "Ray's own metrics exporter",
    "train/launch.py": "places a run on workers of a cluster",
    "tune/*": "a sweep is trials on a cluster",
}
"""The only files that know Ray; everything else is plain Python that a test can drive."""

NEVER = {
    "deployments/gateway/*": (
        {"torch", "transformers", "safetensors", "peft"},
        "gateway replicas decide and forward; torch would double their memory and start time",
    ),
    "deployments/launcher/*": (
        {"torch", "transformers"},
        "the launcher stays resident beside what it launched",
    ),
    "deployments/config.py": (
        {"torch", "transformers"},
        "a configuration is judged before anything heavy starts",
    ),
    "models/contracts.py": ({"torch", "transformers"}, "everyone imports it"),
    "models/errors.py": ({"torch", "transformers"}, "everyone imports it"),
}

PURE = ("admission", "drain", "fairness", "pace", "prefixes", "queue", "scheduler", "sequence")
"""Of ``deployments/engines``: they decide and do not compute; a test drives them step by step."""
IMPURE = {"torch", "transformers", "safetensors", "peft", "numpy", "ray", "asyncio", "threading"}
"""What no pure module may lead to, directly or through others of ours."""

FILES = sorted(
    path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).glob("**/*.py")
)


def imports(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Full names of all that ``source``, a module of ``package``, imports, wherever it does.

    Imports for annotations alone (``if TYPE_CHECKING:``) load nothing and are left out.
    """
    tree = ast.parse(source)
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    found = imports((ROOT / path).read_text(), path.parent.parts)
    return {name.partition(".")[0] for name in found}


def leads_to(path: Path) -> dict[str, Path]:
    """Libraries that a file of ours imports, itself or through other files of ours, wherever they
    do; and the file that does.
    """
    found: dict[str, Path] = {}
    seen: set[Path] = set()
    ahead = [path]
    while ahead:
        at = ahead.pop()
        if at in seen:
            continue
        seen.add(at)
        for name in imports((ROOT / at).read_text(), at.parent.parts):
            root = name.partition(".")[0]
            if root in SIBLINGS:
                ahead += files_of(name)
            else:
                found.setdefault(root, at)
    return found


def files_of(name: str) -> Iterator[Path]:
    """The module that an import names, itself or something in it, and the packages around it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        for file in (Path(*parts[:end], "__init__.py"), Path(*parts[:end]).with_suffix(".py")):
            if (ROOT / file).is_file():
                yield file


def test_imports_go_one_way() -> None:
    wrong = {
        str(path): sorted(beyond)
        for path in FILES
        if (beyond := roots(path) & SIBLINGS - LAYERS[path.parts[0]] - {path.parts[0]})
    }
    assert not wrong, "these import a sibling that LAYERS does not allow them"


def test_ray_stays_at_the_edge() -> None:
    wrong = [
        str(path)
        for path in FILES
        if "ray" in roots(path) and not any(fnmatch(str(path), edge) for edge in RAY_EDGES)
    ]
    assert not wrong, "these import ray; if they must, say why in RAY_EDGES"


def test_heavy_libraries_stay_where_they_work() -> None:
    wrong = [
        f"{path} imports {', '.join(sorted(found))}: {reason}"
        for path in FILES
        for pattern, (heavy, reason) in NEVER.items()
        if fnmatch(str(path), pattern) and (found := roots(path) & heavy)
    ]
    assert not wrong


@pytest.mark.parametrize("name", PURE)
def test_what_decides_is_plain_python(name: str) -> None:
    found = leads_to(Path(f"deployments/engines/{name}.py"))
    assert not {library: str(file) for library, file in found.items() if library in IMPURE}


def test_what_a_file_leads_to_is_found_through_others() -> None:
    found = leads_to(Path("deployments/engines/scheduler.py"))
    assert found["pydantic"] == Path("deployments/config.py"), "which is a queue's affair"
    assert leads_to(Path("deployments/engines/output.py")).keys() >= {"torch", "llguidance"}


def test_folders_of_packages_do_not_hide_the_standard_library() -> None:
    assert not LAYERS.keys() & sys.stdlib_module_names


def test_imports_are_found_in_every_form() -> None:
    source = """
from typing import TYPE_CHECKING
import a.b
from . import c
from ..d import e
from .f.g import h
if TYPE_CHECKING:
    import torch
def late():
    import i
"""
    assert set(imports(source, ("x", "y"))) == {
        *("typing.TYPE_CHECKING", "a.b", "x.y.c", "x.d.e", "x.y.f.g.h", "i")
    }


@pytest.mark.parametrize("module", ["deployments.app", "deployments.launcher.__main__"])
def test_a_gateway_and_whoever_starts_it_do_without_torch(module: str) -> None:
    """The table above sees direct imports; this sees what they lead to when it is begun. (Later it
    may be more: weights are converted in a child that is gone when that is done.)
    """
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_is_imported_is_declared() -> None:
    """The lock holds it either way, but not for whoever installs the package with one extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(line for name in extras if name != "dev" for line in extras[name]),
    ]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    known = metadata.packages_distributions()
    missing = {
        root: str(path)
        for path in FILES
        for root in roots(path) - SIBLINGS - sys.stdlib_module_names
        if not declared & {canonicalize_name(each) for each in known.get(root, [root])}
    }
    assert not missing, "in pyproject.toml, in the dependencies or the extra that it is of"
