"""Export and quantisation of a real, if untrained, network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.predictors import image, onnx_image
from train.recipes.compression.onnx_int8 import export, quantise

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow  # torch's exporter takes seconds


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    net = image.build(image.ARCHITECTURE, seed=3)
    pixels = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    export(net, pixels[:2], folder / "whole.onnx")
    quantise(folder / "whole.onnx", pixels.numpy(), folder / "small.onnx")
    return folder / "whole.onnx", folder / "small.onnx"


def logits(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    session = onnx_image.session(path)
    (found,) = session.run([onnx_image.OUTPUT], {onnx_image.INPUT: pixels.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_both_files_answer_like_the_network(files: tuple[Path, Path], count: int) -> None:
    pixels = torch.rand(count, 1, 28, 28)
    with torch.no_grad():
        truth = image.build(image.ARCHITECTURE, seed=3)(pixels)
    torch.testing.assert_close(logits(files[0], pixels), truth, atol=1e-5, rtol=1e-4)
    off = (logits(files[1], pixels) - truth).abs().max()
    assert 0 < off < 0.1 * truth.abs().max()


def test_int8_is_a_third_of_the_size_and_nothing_is_left_beside_it(
    files: tuple[Path, Path],
) -> None:
    whole, small = files
    assert small.stat().st_size < whole.stat().st_size / 3
    assert {path.name for path in small.parent.iterdir()} == {"whole.onnx", "small.onnx"}


def test_files_do_not_say_where_they_were_made(files: tuple[Path, Path]) -> None:
    for file in files:
        content = file.read_bytes()
        for word in (b"site-packages", b"stack_trace", str(Path.cwd()).encode()):
            assert word not in content
