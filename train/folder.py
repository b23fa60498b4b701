"""The directory of a run: all that is needed to judge it, to go on with it, to make it again.

::

    runs/RECIPE/RUN/config.yaml        what was asked for, every default filled in
    runs/RECIPE/RUN/environment.json   code revision, packages, machine, seed
    runs/RECIPE/RUN/data.json          what it learned from, with hashes
    runs/RECIPE/RUN/metrics.jsonl      every report; train/history.py
    runs/RECIPE/RUN/checkpoints/       train/checkpoints.py
    runs/RECIPE/RUN/artifact/          what the recipe made, sealed by models/artifact.py
    runs/RECIPE/RUN/plots/ tensorboard/ ...
    runs/RECIPE/RUN/result.json        metrics and gates; written last
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from models.errors import ConfigError, Unavailable
from train import disk

CONFIG, ENVIRONMENT, RESULT = "config.yaml", "environment.json", "result.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a run was asked to do: the contents of ``config.yaml``."""

    recipe: str
    smoke: bool
    config: Mapping[str, Any]
    """The recipe's, resolved."""
    launch: Mapping[str, Any]
    """How and where; another one may be given when the run goes on."""
    inputs: Mapping[str, str]
    """Folders by kind."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Of the contents of the inputs, by kind. Where they lie may change."""

    def differs(self, other: Request) -> str:
        """What makes ``other`` another run; nothing if it is the same one."""
        if self.recipe != other.recipe:
            return f"its recipe is {self.recipe}, not {other.recipe}"
        for key in sorted(self.config.keys() | other.config.keys()):
            ours, theirs = self.config.get(key), other.config.get(key)
            if ours != theirs:
                return f"its {key} is {ours!r}, not {theirs!r}"
        for kind in sorted(self.hashes.keys() | other.hashes.keys()):
            ours, theirs = (each.hashes.get(kind, "none")[:12] for each in (self, other))
            if ours != theirs:
                return f"its input {kind} has the content {ours}, not {theirs}"
        return "" if self.smoke == other.smoke else "one is a smoke run"


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @classmethod
    def fresh(cls, runs: Path, recipe: str, run_name: str | None = None) -> RunFolder:
        """A new one under ``runs``; ids sort by time."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", run_name).strip("-.") if run_name else ""
        return cls(runs / recipe / "-".join(filter(None, [stamp, name, secrets.token_hex(2)])))

    def request(self) -> Request | None:
        """What this run was asked for; ``None`` if it has not begun.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            tree = yaml.safe_load((self.path / CONFIG).read_text())
            return Request(**tree)
        except FileNotFoundError:
            return None
        except (OSError, TypeError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.path / CONFIG} cannot be read ({error})") from None

    def check(self, request: Request) -> None:
        """Raises ConfigError: the folder holds another run, or something that is no run."""
        before = self.request()
        if before is None and self.path.is_dir() and any(_foreign(self.path)):
            raise ConfigError(
                f"{self.path} is not empty and holds no run; choose another folder with --out"
            )
        if before is not None and (difference := before.differs(request)):
            raise ConfigError(
                f"{self.path} holds another run: {difference}; choose another folder with --out"
            )

    def begin(self, request: Request, environment: Mapping[str, Any]) -> None:
        """Write down what is asked for, before anything else.

        Raises:
            ConfigError: as ``check`` does.
        """
        self.check(request)
        with disk.explain_full(self.path, "The run directory"):
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            disk.write_json(self.path / ENVIRONMENT, {**self._earlier(), **environment})
            tree = {name: getattr(request, name) for name in Request.__slots__}
            disk.write_text(self.path / CONFIG, yaml.safe_dump(tree, sort_keys=False))

    def _earlier(self) -> dict[str, Any]:
        """Of a run that goes on: the code of each attempt counts."""
        try:
            told = json.loads((self.path / ENVIRONMENT).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        code = [*told.get("earlier_revisions", []), told["code_revision"]]
        return {"earlier_revisions": code}

    def result(self) -> dict[str, Any] | None:
        """How the run ended; ``None`` if it has not."""
        try:
            found: dict[str, Any] = json.loads((self.path / RESULT).read_text())
        except FileNotFoundError:
            return None
        return found

    def finish(self, result: Mapping[str, Any]) -> None:
        disk.write_json(self.path / RESULT, result)

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Keep a second driver out; let go also if this process is killed.

        Raises:
            ConfigError: another one drives this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".driver.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{self.path} is being run by another process; wait for it, or stop it"
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def written(self, patience_s: float = 60) -> Iterator[None]:
        """Be the one process that writes history and checkpoints.

        A worker that is being killed, or that lost its driver, may live for some seconds.
        """
        lock = FileLock(self.path / ".writer.lock")
        try:
            lock.acquire(timeout=patience_s)
        except Timeout:
            raise Unavailable(
                f"{self.path}: a worker of an earlier attempt still writes after {patience_s:g} s"
            ) from None
        try:
            yield
        finally:
            lock.release()


def _foreign(path: Path) -> Iterator[str]:
    return (name for name in os.listdir(path) if not name.startswith("."))
