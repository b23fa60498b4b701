"""A configuration that only a replica can find wrong, when it has loaded the model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from deployments.launcher.background import NotServed
from tests.cluster.conftest import serving, tiny_args

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_a_model_that_its_replica_refuses_is_one_clear_line(
    long_llama: Path, tmp_path: Path
) -> None:
    config = tiny_args(long_llama, replicas=1, slots=1)
    config["models"]["tiny"]["engine"]["context"] = 99_999
    met: set[psutil.Process] = set()
    over = threading.Event()

    def look() -> None:
        """Whom the launcher starts, while it does."""
        while not over.wait(0.2):
            met.update(psutil.Process().children(recursive=True))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            with pytest.raises(NotServed) as raised, serving(config, tmp_path):
                pass
        finally:
            over.set()
        looking.result()
    said = str(raised.value).splitlines()
    error, place = [line for line in said if line.startswith("error: ")]
    assert error.startswith("error: tiny: engine.context is 99999, but ")
    assert "was trained for 8192 tokens" in error
    assert place == "error: the whole log is .cache/logs/serve.log"
    assert not [line for line in said if "Traceback" in line]
    assert len(met) > 5
    assert not [process for process in met if process.is_running()]
