"""Every process we started, and every process those started: found, stopped, reaped.

Ray's daemons leave their process group and outlive their parents. On Linux this process
declares itself the reaper of orphans among its descendants, so that all of them remain
its descendants whatever they do, and a walk down the tree finds them. Never by name: a
user's other Ray clusters are not ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def adopt_orphans() -> None:
    """From now on orphaned descendants become our children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def spawn(
    command: Sequence[str | Path], *, log: Path, env: Mapping[str, str], dies_with_us: int
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own, so that Ctrl-C reaches us alone.

    Args:
        command: program and arguments.
        log: gets its output, from the start.
        env: all of its environment.
        dies_with_us: the signal it gets should we be killed outright.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            preexec_fn=partial(_prctl, _PR_SET_PDEATHSIG, dies_with_us),  # no threads here yet
        )


def reap_orphans() -> None:
    """Collect adopted children that have ended, so that none stays as a zombie."""
    for child in psutil.Process().children():
        if child.status() == psutil.STATUS_ZOMBIE:
            try:
                os.waitpid(child.pid, os.WNOHANG)
            except ChildProcessError:
                continue


def stop(process: subprocess.Popen[bytes], *, by: signal.Signals, within_s: float) -> bool:
    """Signal ``process`` and wait; whether it ended in time."""
    if process.poll() is None:
        process.send_signal(by)
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def sweep(*, grace_s: float = 3.0) -> list[str]:
    """End every descendant that is left: politely, then not. Names of those it met."""
    met: list[str] = []
    for send in (psutil.Process.terminate, psutil.Process.kill):
        left = [p for p in psutil.Process().children(recursive=True) if p.is_running()]
        for process in left:
            try:
                met.append(f"{process.pid} {process.name()}")
                send(process)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=grace_s)
    reap_orphans()
    return met
