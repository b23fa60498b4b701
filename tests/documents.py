"""README.md and docs/: their code blocks, run as written, and their links.

What is run says so behind the language of its fence:

    ```python run          by itself
    ```bash served         beside a platform, whose address replaces localhost:8000
    ```console served      `$ ` commands; what follows each is its output, `...` is anything
    ```console story       the same, beside the platform with nothing registered
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESS = "localhost:8000"

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)(?P<target>[^)#\s]+)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced code block."""

    path: Path
    line: int
    language: str
    words: frozenset[str]
    code: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text()
    for found in _FENCE.finditer(text):
        language, *words = found["info"].split() or [""]
        code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.M)
        line = text.count("\n", 0, found.start()) + 1
        yield Block(path, line, language, frozenset(words), code)


def marked(word: str) -> list[Block]:
    return [block for path in documents() for block in blocks(path) if word in block.words]


def links(path: Path) -> Iterator[str]:
    """Targets of links to other files of the repository."""
    outside_code = _FENCE.sub("", path.read_text())
    yield from (found["target"] for found in _LINK.finditer(outside_code))


def run(block: Block, *, address: str = ADDRESS) -> None:
    """Raises:
    AssertionError: a command failed, or said something else than the document says.
    """
    code = block.code.replace(ADDRESS, address)
    match block.language:
        case "python":
            _output([sys.executable, "-c", code])
        case "bash":
            _output(["bash", "-euo", "pipefail", "-c", code])
        case "console":
            for command, expected in _session(code):
                output = _output(["bash", "-euo", "pipefail", "-c", command])
                assert not expected or _matches(output, expected), output
        case language:
            raise AssertionError(f"{block}: {language!r} cannot be run")


def _session(code: str) -> Iterator[tuple[str, str]]:
    """Commands of a console block, each with the output that is shown for it."""
    for part in re.split(r"^\$ ", code, flags=re.M)[1:]:
        command, _, expected = re.sub(r"\\\n", " ", part).partition("\n")
        yield command, expected.strip()


def _matches(output: str, expected: str) -> bool:
    pattern = ".*".join(re.escape(piece.strip()) for piece in expected.split("..."))
    return re.fullmatch(pattern, output.strip(), re.S) is not None


def _output(command: list[str]) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout
