"""Nothing that was started for us survives us, however it hides."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reaping orphans is Linux's")

DAEMON = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
hide = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
daemon = subprocess.Popen([sys.executable, "-c", hide], start_new_session=True)
print(daemon.pid, flush=True)
"""
"""Starts a daemon in a session of its own that ignores SIGTERM, and ends."""

US = f"""
import os, signal, sys, time
from pathlib import Path
from deployments.launcher import processes
processes.adopt_orphans()
log = Path(sys.argv[1])
child = processes.spawn(
    [sys.executable, "-c", {DAEMON!r}], log=log, env=dict(os.environ), dies_with_us=signal.SIGTERM
)
child.wait()
if sys.argv[2] == "sweep":
    processes.sweep(grace_s=0.2)
"""


def run(log: Path, how: str) -> int:
    """The daemon that a process of ours left behind, or has swept away."""
    subprocess.run([sys.executable, "-c", US, str(log), how], check=True, timeout=60)
    return int(log.read_text())


def test_a_daemon_that_ignores_us_is_swept(tmp_path: Path) -> None:
    assert not psutil.pid_exists(run(tmp_path / "log", "sweep"))


def test_it_is_the_sweep_that_does_it(tmp_path: Path) -> None:
    left = run(tmp_path / "log", "no sweep")
    assert psutil.pid_exists(left)
    psutil.Process(left).kill()


def test_a_child_ends_with_us_when_we_are_killed(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, time
from pathlib import Path
from deployments.launcher import processes
sleep = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
env, log = dict(os.environ), Path({str(tmp_path / "log")!r})
child = processes.spawn(sleep, log=log, env=env, dies_with_us=signal.SIGTERM)
while not log.read_text():
    time.sleep(0.01)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    child = int(killed.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
