"""A benchmark's outcome as a Markdown file: the command, the machine, the tables.

A figure is worth what its circumstances say, so they are written beside it. Nothing that
names the machine itself goes in.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "ray")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats with three significant digits."""
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(slots=True)
class Report:
    """Collects sections, prints them as they come, and writes the file at the end."""

    theme: str
    """First part of the file's name, as in ``engine_cpu_2026-01-31.md``."""
    title: str
    hardware: str = "cpu"
    sections: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        print(text, flush=True)
        self.sections.append(text)

    @property
    def path(self) -> Path:
        today = datetime.datetime.now(tz=datetime.UTC).date()
        return RESULTS / f"{self.theme}_{self.hardware}_{today}.md"

    def write(self) -> Path:
        path = self.path
        RESULTS.mkdir(exist_ok=True)
        body = "\n\n".join([f"# {self.title}", circumstances(), *self.sections])
        path.write_text(body + "\n")
        print(
            f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}"
        )
        return path


def circumstances() -> str:
    """The command, processor, memory and versions."""
    command = shlex.join(["python", "-m", _module(), *sys.argv[1:]])
    memory = psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"`{command}`\n\n{os.cpu_count()} cores ({_cpu_model()}), {memory:.0f} GB;"
        f" Python {platform.python_version()}, {versions}."
    )


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
