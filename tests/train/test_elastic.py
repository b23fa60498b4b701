"""A group that loses a machine for good goes on with those that are left."""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.toys.duo import RECIPE, Duo
from train import history
from train.config import Launch
from train.folder import RunFolder
from train.run import run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Train imports Ray Data
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # ray.cluster_utils leaves log files
]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without room for workers, and two machines with room for one each."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    made = Cluster()
    made.add_node(num_cpus=0, include_dashboard=False, temp_dir=folder)
    for _ in range(2):
        made.add_node(num_cpus=1)
    ray.init(made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_group_goes_on_with_fewer_when_a_machine_is_lost_for_good(
    cluster: Any, tmp_path: Path
) -> None:
    from train.launch import place

    config, out = Duo(steps=60, every=7, pause_s=0.05), tmp_path / "ray"

    def lose_a_machine() -> None:
        while len(history.read(out)) < 20:
            time.sleep(0.01)
        cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)

    loss = threading.Thread(target=lose_a_machine, daemon=True)
    loss.start()
    launch = Launch(workers=(1, 2))
    result = run(RECIPE, config, folder=RunFolder(out), place=place(RECIPE, launch, workers=(1, 2)))
    loss.join(5)
    assert not loss.is_alive()
    assert result.metrics["workers"] == 1
    run(RECIPE, Duo(steps=60, every=7), folder=RunFolder(tmp_path / "here"))
    there, here = history.read(out), history.read(tmp_path / "here")
    assert [each.step for each in there] == [*range(1, 61)]
    assert all(
        math.isclose(a.metrics["place"], b.metrics["place"], rel_tol=1e-9, abs_tol=1e-9)
        for a, b in zip(there, here, strict=True)
    )
