from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deployments.guardrails.safety.head import FILE, Head, sigmoid
from models.errors import ConfigError

SMALL = Head(encoder="e", weights=np.array([1.0, -2.0]), intercept=0.5, threshold=0.9)


def test_scores() -> None:
    found = SMALL.scores([[0.0, 0.0], [1.0, 0.0], np.array([0.0, 1.0], dtype=np.float32)])
    assert found.tolist() == pytest.approx([0.6225, 0.8176, 0.1824], abs=1e-4)


def test_scores_have_no_overflow() -> None:
    assert sigmoid(np.array([-1e6, 0.0, 1e6])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("vectors", [[[1.0]], [[1.0, 2.0, 3.0]], [1.0, 2.0]])
def test_vectors_of_another_encoder_are_refused(vectors: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match="trained on e, which has 2"):
        SMALL.scores(vectors)


def test_a_file_comes_back(tmp_path: Path) -> None:
    SMALL.save(tmp_path / "head.json", why="a test")
    loaded = Head.load(tmp_path / "head.json")
    assert loaded.weights.tolist() == SMALL.weights.tolist()
    assert (loaded.encoder, loaded.intercept, loaded.threshold) == ("e", 0.5, 0.9)
    assert '"why": "a test"' in (tmp_path / "head.json").read_text()


@pytest.mark.parametrize("text", ["", "{}", '{"encoder": "e", "weights": "x"}', "[]"])
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be used"):
        Head.load(tmp_path / "head.json")


def test_the_one_that_is_shipped() -> None:
    head = Head.load()
    assert (head.encoder, head.dimensions) == ("all-MiniLM-L6-v2", 384)
    assert 0 < head.threshold < 1
    assert FILE.stat().st_size < 10_000
