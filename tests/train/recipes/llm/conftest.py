from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.recipes.llm.experiment import write_text


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: more threads only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small documents."""
    return write_text(tmp_path_factory.mktemp("text"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PEFT 0.21 asks transformers 5.23 by an old name."""
    old = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(old)
