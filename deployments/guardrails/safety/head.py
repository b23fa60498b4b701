"""The trained part: one number for each dimension of the encoder's vectors, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ConfigError

FILE = Path(__file__).parent / "head.json"
Vectors = Sequence[Sequence[float] | NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    encoder: str
    """Whose vectors it understands."""
    weights: NDArray[np.float64]
    intercept: float
    threshold: float
    """From which score on a text counts as unsafe, unless the configuration says otherwise."""

    @property
    def dimensions(self) -> int:
        return len(self.weights)

    def scores(self, vectors: Vectors) -> NDArray[np.float64]:
        """Of each vector, from 0 (safe) to 1.

        Raises:
            ConfigError: they are of another encoder.
        """
        rows = np.asarray(vectors, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.dimensions:
            width = rows.shape[1] if rows.ndim == 2 else "uneven"
            raise ConfigError(
                f"gateway.guardrails.safety.model: its vectors have {width} dimensions; the safety"
                f" classifier was trained on {self.encoder}, which has {self.dimensions}"
            )
        return sigmoid(rows @ self.weights + self.intercept)

    def save(self, file: Path, **facts: Any) -> None:
        """With ``facts`` about how it was made, for whoever looks into the file."""
        body = {
            "encoder": self.encoder,
            "threshold": round(self.threshold, 3),
            "intercept": round(self.intercept, 3),
            "weights": [round(weight, 3) for weight in self.weights.tolist()],
            **facts,
        }
        text = json.dumps(body, indent=1)
        file.write_text(_numbers_on_few_lines(text) + "\n")

    @classmethod
    def load(cls, file: Path = FILE) -> Head:
        """Raises ConfigError: the file cannot be used."""
        try:
            given = json.loads(file.read_text())
            return cls(
                encoder=str(given["encoder"]),
                weights=np.array(given["weights"], dtype=np.float64),
                intercept=float(given["intercept"]),
                threshold=float(given["threshold"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} cannot be used ({error})") from None


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the overflow that ``exp`` has for large ones."""
    half: NDArray[np.float64] = np.tanh(logits / 2) / 2
    return half + 0.5


def _numbers_on_few_lines(text: str) -> str:
    head, _, rest = text.partition('"weights": [\n')
    numbers, _, tail = rest.partition("\n ]")
    each = [number.strip() for number in numbers.split(",\n")]
    lines = [", ".join(each[at : at + 12]) for at in range(0, len(each), 12)]
    return head + '"weights": [\n  ' + ",\n  ".join(lines) + "\n ]" + tail
