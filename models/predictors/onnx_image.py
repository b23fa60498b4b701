"""An image classifier as an ONNX file, computed by onnxruntime: the same inputs and outputs as
:mod:`models.predictors.image`, without torch.

::

    model.onnx   pixels [n, 1, height, width], 0 … 1 → logits [n, classes]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.contracts import Json
from models.errors import ConfigError
from models.predictors import image

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Read when onnxruntime is imported, anywhere. Without it, 1.32 makes an id of this machine and
# collects events about its use for its maker, under the home directory.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

MODEL = "model.onnx"
INPUT, OUTPUT = "pixels", "logits"


def session(path: Path, *, threads: int = 1) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Raises:
        ConfigError: onnxruntime is missing, or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("ONNX models need pip install 'frontier-run[edge]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds; they have no common base
        raise ConfigError(f"{path} cannot be used: {error}") from None


def load(folder: Path) -> OnnxImagePredictor:
    return OnnxImagePredictor(session(folder / MODEL))


class OnnxImagePredictor:
    """Inputs and outputs as of :class:`models.predictors.image.ImagePredictor`."""

    def __init__(self, session: Any) -> None:
        self._session = session
        _, _, self._height, self._width = session.get_inputs()[0].shape

    def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
        """See :class:`models.contracts.Predictor`."""
        if not inputs:
            return []
        images = image.grey_values(inputs, self._height, self._width)
        return [
            {"label": int(row.argmax()), "probabilities": row.tolist()}
            for row in softmax(self._logits((images[:, None] / image.BRIGHTEST).astype(np.float32)))
        ]

    def _logits(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._session.run([OUTPUT], {INPUT: pixels})[0]
        return logits


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    shifted = np.exp(logits - logits.max(1, keepdims=True))
    result: NDArray[np.float32] = shifted / shifted.sum(1, keepdims=True)
    return result
