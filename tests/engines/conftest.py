from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deployments.config import EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from tests import tiny_models
from tests.engines.reference import Reference, with_many_eos


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: more threads only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _calibrated_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is found out of tiny models is nothing to keep."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deployments.engines.calibration.default_cache", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model, by architecture; made once a session."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_models.make(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def llama(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that meets an end of sequence now and then."""
    return with_many_eos(tiny("llama"), tmp_path_factory.mktemp("llama-eos"))


@pytest.fixture(scope="session")
def reference(llama: Path) -> Reference:
    """What ``llama`` answers."""
    return Reference(llama)


EXACT = EngineConfig(slots=4, step_tokens=16, dtype="float64", threads=1)


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Start engines; they are closed when the test ends."""
    engines: list[Engine] = []

    def engine(
        folder: Path,
        config: EngineConfig = EXACT,
        queue: QueueConfig | None = None,
        **options: object,
    ) -> Engine:
        made = Engine("tiny", folder, config, queue or QueueConfig(), **options)  # type: ignore[arg-type]
        engines.append(made)
        return made

    yield engine
    for made in engines:
        made.close()
