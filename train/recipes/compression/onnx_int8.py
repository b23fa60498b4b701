"""A torch network as an ONNX file, in float32 and with whole numbers of 8 bits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import ConfigError
from models.predictors.onnx_image import INPUT, OUTPUT

if TYPE_CHECKING:
    import torch
    from torch import nn


def export(net: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write ``net`` as ONNX, for batches of any size; ``example`` is one, of at least two."""
    import torch

    # torch's exporter asks for onnxscript late, and says less
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ConfigError("ONNX export needs pip install 'frontier-run[edge]'")
    import onnx

    with warnings.catch_warnings():  # it warns of itself
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # and of a missing torchvision
        program = torch.onnx.export(
            net.eval(),
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # The exporter notes for each node the source lines it came from: half of a small file,
    # another file on every machine, and nothing of a stranger's business.
    for part in (*model.graph.node, *model.graph.value_info, model.graph, model):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save_model(model, str(path))


def quantise(source: Path, calibration: np.ndarray, path: Path) -> None:
    """Write ``source`` with int8 weights and activations.

    Static quantisation: the ranges of activations are those seen on ``calibration``. Weights
    have a scale for each output channel, and 7 of their 8 bits are used: with all 8, x86
    processors without VNNI overflow on the way.

    Args:
        calibration: training inputs, shape (n, …).
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError:
        raise ConfigError("int8 ONNX needs pip install 'frontier-run[edge]'") from None

    class Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._batches: Iterator[dict[str, Any]] = (
                {INPUT: part} for part in np.array_split(calibration, -(-len(calibration) // 64))
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Batches(),
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()
