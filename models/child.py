"""Run a Python module in a process that does not outlive us.

For work that a replica must not keep the memory of (importing torch to convert weights)
or that is a program anyway (pip). A child whose parent is killed, even with ``kill -9``,
ends at once: it would otherwise go on writing into a folder that is being cleaned up.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path


def run(
    module: str, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments`` with our import path; output is captured, not checked."""
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    # Nobody writes to this pipe: the child sees its end when we close it, or are gone.
    read, write = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-P", "-m", "models.child", module, *arguments],
            stdin=read,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=os.environ | {"PYTHONPATH": path} | dict(env or {}),
        )
    finally:
        os.close(read)
        os.close(write)


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
