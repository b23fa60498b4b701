"""The Hub: our part with a downloader of our own, huggingface_hub's with a Hub of our own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.errors import ConfigError, Unavailable
from models.sources import fetch
from models.sources.folder import sha256_file

pytestmark = pytest.mark.integration

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a snapshot needs: revision, tree, files."""

    files: dict[str, bytes]
    requested: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            self.answer(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for name, data in self.files.items()
                ]
            )
        elif path == "/api/models/org/tiny" or path.startswith("/api/models/org/tiny/revision/"):
            if path.rpartition("/")[2] in ("tiny", "main", "v1", COMMIT):
                files = [{"rfilename": n, "size": len(data)} for n, data in self.files.items()]
                self.answer({"id": "org/tiny", "sha": COMMIT, "siblings": files})
            else:
                self.refuse("RevisionNotFound")
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.partition(f"{COMMIT}/")[2]
            self.requested.append(name)
            self.answer(self.files[name])
        else:
            self.refuse("RepoNotFound")

    def answer(self, content: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(llama: Path) -> Iterator[ThreadingHTTPServer]:
    Hub.files = {file.name: file.read_bytes() for file in llama.iterdir()}
    Hub.files |= {"pytorch_model.bin": b"a pickle", "modeling.py": b"import os"}
    Hub.requested = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def clean() -> dict[str, str]:
    """Without what earlier tests have told the Hub's client."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")}


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path, root: Path) -> Run:
    """``run(source, endpoint, **environment)``: a fetch in a new process, which reads HF_*."""

    def run(source: str, endpoint: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "models", "fetch", source, "--cache", str(root)],
            env=clean()
            | {"HF_ENDPOINT": str(endpoint), "HF_HOME": str(tmp_path / "hf"), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("source", ["hf:org/tiny", "hf:org/tiny@v1", f"hf:org/tiny@{COMMIT}"])
def test_a_repository(source: str, hub: ThreadingHTTPServer, run: Run, llama: Path) -> None:
    ran = run(source, url(hub))
    assert ran.returncode == 0, ran.stderr
    path = Path(ran.stdout.strip())
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "source.json",
    ]
    assert sha256_file(path / "model.safetensors") == sha256_file(llama / "model.safetensors")
    assert "pytorch_model.bin" not in Hub.requested
    assert json.loads((path / "source.json").read_bytes())["revision"] == COMMIT


@pytest.mark.parametrize("source", ["hf:org/nothing", "hf:org/tiny@nothing"])
def test_no_such_repository(source: str, hub: ThreadingHTTPServer, run: Run) -> None:
    ran = run(source, url(hub))
    assert ran.returncode == 1
    assert "no such repository or revision, or no permission" in ran.stderr
    assert "HF_TOKEN" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_out_of_reach(run: Run) -> None:
    ran = run("hf:org/tiny", "http://127.0.0.1:9")
    assert ran.returncode == 1
    assert "the Hub is out of reach" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_offline_finds_what_the_hubs_own_cache_has(
    hub: ThreadingHTTPServer, run: Run, tmp_path: Path, root: Path
) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    assert "the Hub is out of reach" in run("hf:org/tiny", url(hub), **offline).stderr
    earlier = "import huggingface_hub as h; h.snapshot_download('org/tiny')"
    subprocess.run(
        [sys.executable, "-c", earlier],
        env=clean() | {"HF_ENDPOINT": url(hub), "HF_HOME": str(tmp_path / "hf")},
        check=True,
        capture_output=True,
    )
    ran = run("hf:org/tiny", "http://127.0.0.1:9", **offline)
    assert ran.returncode == 0, ran.stderr
    path = Path(ran.stdout.strip())
    assert not (path / "model.safetensors").is_symlink()
    assert not (path / "pytorch_model.bin").exists()


def test_the_hash_of_a_repository(llama: Path, root: Path) -> None:
    def download(name: str, revision: str | None, into: Path, need: Callable[[int], None]) -> str:
        assert (name, revision) == ("org/tiny", "v1")
        shutil.copytree(llama, into, dirs_exist_ok=True)
        return COMMIT

    with pytest.raises(ConfigError, match="hf:org/tiny@v1: the weights have sha256"):
        fetch("hf:org/tiny@v1", cache=root, sha256="0" * 64, download=download)
    right = sha256_file(llama / "model.safetensors")
    path = fetch("hf:org/tiny@v1", cache=root, sha256=right, download=download)
    assert (path / "model.safetensors").exists()


def test_room_is_asked_for(root: Path) -> None:
    def download(name: str, revision: str | None, into: Path, need: Callable[[int], None]) -> str:
        need(16_000_000_000)
        return COMMIT

    with pytest.raises(Unavailable, match=r"1,000 MB free in .*, about 16,000 MB needed"):
        fetch("hf:org/tiny", cache=root, download=download, free=lambda _: 10**9)
