"""Small sealed artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.artifact import Data, Facts, GateResult, Manifest, Run, seal
from models.signing import Keys

NO_KEYS = Keys()


def facts(**given: Any) -> Facts:
    return Facts(
        **{
            "name": "digits-cnn",
            "kind": "classifier",
            "metrics": {"accuracy": 0.962},
            "gates": (
                GateResult(
                    metric="accuracy", value=0.962, expected=">= 0.955 (logistic)", passed=True
                ),
            ),
            "config": {"seed": 0, "net": {"width": 32, "dropout": 0.1}, "shape": (8, 8)},
            "run": Run(id="20260131-a1", recipe="vision", seed=0, code_revision="c0ffee1"),
            "data": Data(sha256="d" * 64, description="Digits-5k", licence="CC-BY-SA-3.0"),
            "licence": "Apache-2.0",
            **given,
        }
    )


def make(folder: Path, content: str = "1", *, keys: Keys = NO_KEYS, **given: Any) -> Manifest:
    """An artifact with two files, one of them in a folder."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_bytes(content.encode() * 100)
    (folder / "tokenizer" / "vocabulary.json").write_text('{"a": 0}')
    return seal(folder, facts(**given), keys=keys)
