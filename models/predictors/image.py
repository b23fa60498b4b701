"""A small convolutional network that tells what an image shows: {label, probabilities}.

::

    model.json          the architecture
    model.safetensors   its weights, float32
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.contracts import Json
from models.errors import ConfigError
from models.predictors.requests import refuse

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

ARCHITECTURE_FILE, WEIGHTS = "model.json", "model.safetensors"
BRIGHTEST = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """3 x 3 convolutions, each followed by ReLU and 2 x 2 max pooling, then two linear layers."""

    channels: tuple[int, ...] = (16, 32)
    """Of each convolution."""
    hidden: int = 64
    classes: int = 10
    height: int = 28
    width: int = 28


ARCHITECTURE = Architecture()
"""105 866 weights."""


def build(architecture: Architecture, *, seed: int = 0) -> nn.Sequential:
    """A network with random weights that depend on ``seed`` alone."""
    import torch
    from torch import nn

    layers: list[nn.Module] = []
    height, width, before = architecture.height, architecture.width, 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for channels in architecture.channels:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            height, width, before = height // 2, width // 2, channels
        layers += [
            nn.Flatten(),
            nn.Linear(before * height * width, architecture.hidden),
            nn.ReLU(),
            nn.Linear(architecture.hidden, architecture.classes),
        ]
    return nn.Sequential(*layers)


def architecture_of(net: nn.Sequential) -> Architecture:
    """What ``build`` was given, but for the size of images, which is taken to be square."""
    from torch import nn

    convolutions = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    hidden, last = (layer for layer in net if isinstance(layer, nn.Linear))
    cells = hidden.in_features // convolutions[-1].out_channels
    side = math.isqrt(cells) << len(convolutions)
    return Architecture(
        channels=tuple(layer.out_channels for layer in convolutions),
        hidden=hidden.out_features,
        classes=last.out_features,
        height=side,
        width=side,
    )


def save(folder: Path, net: nn.Sequential, architecture: Architecture | None = None) -> None:
    """Write what ``read`` reads."""
    from safetensors.torch import save_file

    architecture = architecture or architecture_of(net)
    (folder / ARCHITECTURE_FILE).write_text(json.dumps(asdict(architecture)) + "\n")
    weights = {name: value.detach().contiguous().cpu() for name, value in net.state_dict().items()}
    save_file(weights, folder / WEIGHTS)


def read(folder: Path) -> nn.Sequential:
    """The network in ``folder``, on the CPU, ready to predict.

    Raises:
        ConfigError: the files do not fit each other.
    """
    from safetensors.torch import load_file

    net = build(_architecture(folder))
    try:
        net.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{folder}: {WEIGHTS} is not of {ARCHITECTURE_FILE}: {said}") from None
    return net.eval()


def _architecture(folder: Path) -> Architecture:
    try:
        given: dict[str, Any] = json.loads((folder / ARCHITECTURE_FILE).read_text())
        return Architecture(**{**given, "channels": tuple(given["channels"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: {ARCHITECTURE_FILE} cannot be used ({error})") from None


def pixels(images: NDArray[np.uint8] | NDArray[np.float32]) -> torch.Tensor:
    """Grey values 0 … 255, shape (n, height, width) → 0 … 1, shape (n, 1, height, width)."""
    import numpy as np
    import torch

    return torch.from_numpy(images.astype(np.float32) / BRIGHTEST).unsqueeze(1)


def load(folder: Path) -> ImagePredictor:
    return ImagePredictor(read(folder), _architecture(folder))


class ImagePredictor:
    """Inputs are images: rows of grey values from 0 to 255, or all of them in one list."""

    def __init__(self, net: nn.Sequential, architecture: Architecture) -> None:
        self._net = net
        self._height, self._width = architecture.height, architecture.width

    def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
        """See :class:`models.contracts.Predictor`."""
        import torch

        if not inputs:
            return []
        images = grey_values(inputs, self._height, self._width)
        with torch.inference_mode():
            probabilities = self._net(pixels(images)).softmax(1)
        return [
            {"label": int(row.argmax()), "probabilities": row.tolist()} for row in probabilities
        ]


def grey_values(inputs: Sequence[Json], height: int, width: int) -> NDArray[np.float32]:
    """Inputs as one array (n, height, width).

    Raises:
        InvalidInput: naming the first input that is no such image.
    """
    import numpy as np

    rows = [_flat(value, index, height, width) for index, value in enumerate(inputs)]
    return np.array(rows, dtype=np.float32).reshape(-1, height, width)


def _flat(value: Json, index: int, height: int, width: int) -> list[float]:
    expected = f"expected {height} rows of {width} grey values, or {height * width} in one list"
    if not isinstance(value, list):
        raise refuse(index, "input", f"An image is a list, not {type(value).__name__}; {expected}.")
    if value and all(isinstance(row, list) for row in value):
        if len(value) != height or any(len(row) != width for row in value):  # type: ignore[arg-type]
            raise refuse(index, "input", f"The image has another size; {expected}.")
        value = [number for row in value for number in row]  # type: ignore[union-attr]
    if len(value) != height * width:
        raise refuse(index, "input", f"The image has {len(value)} values; {expected}.")
    numbers: list[float] = []
    for number in value:
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not 0 <= number <= BRIGHTEST
        ):
            raise refuse(index, "input", f"{number!r:.40} is not a grey value from 0 to 255.")
        numbers.append(number)
    return numbers
