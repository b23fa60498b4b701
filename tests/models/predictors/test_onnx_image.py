"""An ONNX file answers as the network it stands for, with the same inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.errors import ConfigError, InvalidInput
from models.predictors import onnx_image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: np.ndarray) -> Path:
    """One linear layer over images of 3 x 4, written by hand."""
    where = tmp_path_factory.mktemp("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("pixels", kinds.FLOAT, ["n", 1, 3, 4])],
        [helper.make_tensor_value_info("logits", kinds.FLOAT, ["n", 3])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), where / onnx_image.MODEL)
    return where


def test_probabilities_are_those_of_the_network(folder: Path, weights: np.ndarray) -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 12))
    answers = onnx_image.load(folder).predict_batch(images.tolist())
    logits = images / 255 @ weights
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for answer, row in zip(answers, expected, strict=True):
        assert answer["label"] == row.argmax()  # type: ignore[call-overload,index]
        assert answer["probabilities"] == pytest.approx(row, abs=1e-6)  # type: ignore[call-overload,index]


def test_rows_and_one_list_are_the_same_image(folder: Path) -> None:
    predictor = onnx_image.load(folder)
    flat = list(range(12))
    rows = [flat[0:4], flat[4:8], flat[8:12]]
    one, other = predictor.predict_batch([flat, rows])
    assert one == other
    assert predictor.predict_batch([]) == []


def test_a_bad_image_is_named(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="3 rows of 4") as caught:
        onnx_image.load(folder).predict_batch([[0] * 12, [0] * 11])
    assert caught.value.details["index"] == 1


def test_large_logits_stay_finite() -> None:
    found = onnx_image.softmax(np.array([[1e4, 0.0, -1e4]], np.float32))
    assert found.tolist() == [[1.0, 0.0, 0.0]]


def test_what_onnxruntime_cannot_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.onnx cannot be used"):
        onnx_image.load(tmp_path)
    (tmp_path / onnx_image.MODEL).write_bytes(b"not a protocol buffer")
    with pytest.raises(ConfigError, match=r"model\.onnx cannot be used"):
        onnx_image.load(tmp_path)
