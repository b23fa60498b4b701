from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deployments.config import parse
from deployments.launcher import read_ahead


def test_torch_comes_first_then_weights_model_by_model(tmp_path: Path) -> None:
    library = tmp_path / "torch" / "lib" / "libtorch_cpu.so"
    weights = tmp_path / "chat" / "model.safetensors"
    for path in (library, library.with_name("libshm.so"), weights):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    save_file({"weight": np.zeros(1)}, weights)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "chat" / name).write_text("{}")
    platform = parse(
        {
            "models": {
                "gone": {"task": "generate", "source": str(tmp_path / "nowhere")},
                "chat": {"task": "generate", "source": str(tmp_path / "chat")},
            }
        }
    )
    assert list(read_ahead.files(platform, tmp_path)) == [library, weights]


def test_what_only_the_database_knows_is_left_to_the_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "fetch", lambda source: pytest.fail(f"fetched {source}"))
    platform = parse(
        {"models": {"digits": {"task": "predict", "source": "registry:digits@champion"}}}
    )
    assert list(read_ahead.files(platform, tmp_path)) == []
