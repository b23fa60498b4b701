"""The platform in a process of its own, started as ``scripts/serve`` starts it.

For benchmarks and cluster tests: what they meet is what a person meets.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from deployments.launcher import preflight, status

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 120.0


class NotServed(RuntimeError):
    """The platform did not start or did not stop in order; the message has its output."""


@dataclass(frozen=True, slots=True)
class Served:
    """A running platform."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    env: Mapping[str, str]

    @property
    def dashboard(self) -> status.Dashboard:
        """Ray's, through which a running platform can be changed."""
        port = self.env.get("FRONTIER_DASHBOARD_PORT", "8265")
        return status.Dashboard(f"http://127.0.0.1:{port}", status.token(self.env))

    def processes(self) -> list[psutil.Process]:
        """Everything that was started for it, the launcher included."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The replicas of one deployment, oldest first."""
        titled = ((process, _title(process)) for process in self.processes())
        marker = f":{deployment}"
        found = [p for p, t in titled if t.startswith("ray::ServeReplica:") and t.endswith(marker)]
        return sorted(found, key=lambda process: process.create_time())

    def output(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def serving(config: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Serve ``config`` until the block ends.

    Args:
        config: a ``serve_config.yaml``.
        options: as ``scripts/serve`` takes them.
        env: on top of this process's environment and ``scripts/env.sh``.

    Raises:
        NotServed: with what the launcher printed.
    """
    launcher = [sys.executable, "-m", "deployments.launcher", *options, str(config.resolve())]
    environment = {**os.environ, **(env or {})}
    with TemporaryDirectory(prefix="frontier-served-") as folder:
        log = Path(folder) / "output.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f". scripts/env.sh; exec {shlex.join(launcher)}"],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        served = Served(preflight.load(config).url, process, log, environment)
        try:
            _wait_until_ready(served)
            yield served
        finally:
            _stop(served)


def _wait_until_ready(served: Served) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not status.is_ready(served.url):
        if served.process.poll() is not None or time.monotonic() > deadline:
            raise NotServed(served.output())
        time.sleep(0.2)


def _stop(served: Served) -> None:
    """As Ctrl-C does: a terminal signals all that was started from it."""
    if served.process.poll() is None:
        os.killpg(served.process.pid, signal.SIGINT)
    try:
        code = served.process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        served.process.kill()
        raise NotServed(f"it did not stop in time\n{served.output()}") from None
    if code != 0:
        raise NotServed(f"it ended with {code}\n{served.output()}")


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""
