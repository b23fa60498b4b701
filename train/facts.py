"""What made a run: code, packages, machine, data. Enough to make it again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from train import recipes

ROOT = Path(__file__).parents[1]
"""Of the project, or of the copy that a job runs in."""

SOURCES = ("models", "state", "train", "tune")


def code_revision(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> str:
    """A commit, with ``+changes`` if the tree is not clean or has new sources; and the hash of
    recipes that lie elsewhere, if there are any.

    ``ray job submit`` copies the tree without its ``.git``: then ``FRONTIER_REVISION`` or a
    file ``REVISION`` in it says which commit it was, or else the hash of its sources does.
    """
    elsewhere = [Path(folder) for folder in recipes.elsewhere(environ)]
    own = f"+recipes:{_hash_of_sources(elsewhere)}" if elsewhere else ""
    return (environ.get("FRONTIER_REVISION") or _own_revision(root)) + own


def _own_revision(root: Path) -> str:
    if (root / ".git").exists() and (commit := _git(root, "rev-parse", "HEAD")):
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--", *SOURCES)
        new = any(name.endswith(".py") for name in untracked.splitlines())
        return commit + ("+changes" if changed or new else "")
    try:
        return (root / "REVISION").read_text().strip()
    except OSError:
        return f"sources:{_hash_of_sources([root / package for package in SOURCES])}"


def environment(device: str) -> dict[str, Any]:
    """Interpreter, packages and machine. No names of hosts or users."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "packages": _packages(),
    }


@cache
def _packages() -> dict[str, str]:
    found = {
        each.metadata["Name"]: each.version
        for each in importlib.metadata.distributions()
        if each.metadata["Name"]
    }
    return dict(sorted(found.items(), key=lambda each: each[0].lower()))


def _git(root: Path, *words: str) -> str:
    """Nothing if git is not there or says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _hash_of_sources(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder.parent).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
