"""How unusual a row of numbers is, by one of five detectors that were fitted without labels.

``{"features": [17.99, 10.38, …]}`` becomes ``{"score": 0.61, "anomaly": true, "threshold":
0.55, "method": "forest"}``. Scores of different methods are not comparable; each has the
threshold that a given share of its training rows exceeded.

The artifact is JSON, safetensors and arrays in an npz file without pickles. The trees are
arrays of our own because a scikit-learn tree from a file is followed without a check of its
indices (skops therefore does not trust it either); here they are checked once, at load.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.contracts import Json
from models.errors import ConfigError
from models.predictors.requests import Input, Number, parse, refuse

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int32]

FILE = "anomaly.json"
FOREST = "forest.npz"
AUTOENCODER = "autoencoder.safetensors"
LARGEST = 1e30
"""Of a feature; far inside the range of float32, in which trees compare."""


class Request(Input):
    features: list[Annotated[Number, Field(ge=-LARGEST, le=LARGEST)]]
    method: str | None = None


class Detector(Protocol):
    def scores(self, rows_nf: Array) -> Array:
        """(n,): the higher, the more unusual. A row's score depends on nothing else."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """The feature furthest away from its centre, in units of its spread.

    This is the z-score with mean and standard deviation, Grubbs' statistic with those of
    what Grubbs' test leaves, and so on.
    """

    center: Array
    spread: Array

    def scores(self, rows_nf: Array) -> Array:
        return cast(Array, (np.abs(rows_nf - self.center) / self.spread).max(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """The feature furthest outside the quartiles, in interquartile ranges (Tukey 1977)."""

    low: Array
    high: Array
    """The quartiles."""

    def scores(self, rows_nf: Array) -> Array:
        outside = np.maximum(self.low - rows_nf, rows_nf - self.high)
        return cast(Array, (outside / (self.high - self.low)).max(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """An isolation forest (Liu, Ting & Zhou 2008) as arrays over (tree, node), root first.

    A leaf is its own child, so that all rows can take the same number of steps.
    """

    left: Indices
    right: Indices
    feature: Indices
    threshold: Array
    length: Array
    """Path length with which a row that ends in this node is counted."""
    depth: int
    typical: float
    """Mean path length over a random tree of the sample size: a score of 1/2."""

    def scores(self, rows_nf: Array) -> Array:
        values_nf = rows_nf.astype(np.float32)  # as the trees were grown
        trees_1t = np.arange(len(self.left))[None]
        rows_n1 = np.arange(len(rows_nf))[:, None]
        nodes_nt = np.zeros((len(rows_nf), len(self.left)), dtype=np.int32)
        for _ in range(self.depth):
            values_nt = values_nf[rows_n1, self.feature[trees_1t, nodes_nt]]
            goes_left = values_nt <= self.threshold[trees_1t, nodes_nt]
            nodes_nt = np.where(
                goes_left, self.left[trees_1t, nodes_nt], self.right[trees_1t, nodes_nt]
            )
        mean_n = self.length[trees_1t, nodes_nt].mean(axis=1)
        return cast(Array, np.exp2(-mean_n / self.typical))

    def check(self, features: int) -> None:
        """Raises ConfigError unless every walk stays inside and ends."""
        shape = self.left.shape
        arrays = (self.left, self.right, self.feature, self.threshold, self.length)
        sound = len(shape) == 2 and min(shape) > 0 and all(one.shape == shape for one in arrays)
        if sound:
            own = np.arange(shape[1])[None]
            for child in (self.left, self.right):
                sound &= bool(((child >= own) & (child < shape[1])).all())
            sound &= bool(((self.feature >= 0) & (self.feature < features)).all())
            sound &= bool(np.isfinite(self.threshold).all() and np.isfinite(self.length).all())
            sound &= 0 < self.depth <= shape[1] and self.typical > 0
        if not sound:
            raise ConfigError(f"{FOREST} is damaged: its trees lead nowhere.")

    @classmethod
    def read(cls, path: Path, features: int) -> Forest:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                forest = cls(
                    left=_array(arrays["left"], np.int32),
                    right=_array(arrays["right"], np.int32),
                    feature=_array(arrays["feature"], np.int32),
                    threshold=_array(arrays["threshold"], np.float64),
                    length=_array(arrays["length"], np.float64),
                    depth=int(arrays["depth"]),
                    typical=float(arrays["typical"]),
                )
        except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{FOREST} is damaged: {error}") from error
        forest.check(features)
        return forest

    def write(self, path: Path) -> None:
        np.savez_compressed(
            path,
            left=self.left,
            right=self.right,
            feature=self.feature,
            threshold=self.threshold,
            length=self.length,
            depth=np.int64(self.depth),
            typical=np.float64(self.typical),
        )


class Autoencoder:
    """The mean squared error of what a narrow network makes of the standardised row.

    In float64, so that a batch mate moves no visible digit.
    """

    def __init__(self, network: Any, center: Array, spread: Array) -> None:
        self._network = network.double().eval()
        self.center = center
        self.spread = spread

    def write(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(self._network.state_dict(), path)

    def scores(self, rows_nf: Array) -> Array:
        import torch

        with torch.inference_mode():
            inputs_nf = torch.from_numpy(self.standardised(rows_nf))
            error_nf = self._network(inputs_nf) - inputs_nf
        return cast(Array, (error_nf**2).mean(1).numpy())

    def standardised(self, rows_nf: Array) -> Array:
        return np.clip((rows_nf - self.center) / self.spread, -LIMIT, LIMIT)


LIMIT = 1e6
"""Standard deviations; the autoencoder's error grows no further."""


def autoencoder_network(widths: Sequence[int]) -> Any:
    """Linear layers of these widths with tanh between them."""
    from torch import nn

    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class MethodSettings(BaseModel):
    """Threshold and, by name, numbers for each feature."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    threshold: float
    arrays: dict[str, tuple[float, ...]] = {}


class Settings(BaseModel):
    """``anomaly.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: tuple[str, ...]
    """Their names, in the order of a request."""
    default: str
    """The method of a request that names none."""
    methods: dict[str, MethodSettings]
    autoencoder: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = ()
    """Widths of its layers."""


class AnomalyDetector:
    """A Predictor over fitted detectors."""

    def __init__(self, settings: Settings, detectors: Mapping[str, Detector]) -> None:
        self._settings = settings
        self._detectors = detectors

    @property
    def features(self) -> tuple[str, ...]:
        return self._settings.features

    @property
    def default(self) -> str:
        """The method of a request that names none."""
        return self._settings.default

    def scorer(self, method: str) -> Callable[[Array], Array]:
        """Rows (n, features) → (n,). Raises ConfigError: the artifact has no such method."""
        if method not in self._detectors:
            known = ", ".join(self._detectors)
            raise ConfigError(f"this detector has no method {method!r}; known are {known}")
        return self._detectors[method].scores

    def predict_batch(self, inputs: Sequence[Json]) -> Sequence[Json]:
        """Raises InvalidInput, with ``details["index"]``, before anything is computed."""
        requests = parse(Request, inputs)
        names = [self._method(request, index) for index, request in enumerate(requests)]
        outputs: list[Json] = [None] * len(requests)
        for name in sorted(set(names)):
            places = [place for place, one in enumerate(names) if one == name]
            rows_nf = np.array([requests[place].features for place in places], dtype=np.float64)
            threshold = self._settings.methods[name].threshold
            scores = self._detectors[name].scores(rows_nf).tolist()
            for place, score in zip(places, scores, strict=True):
                outputs[place] = {
                    "score": score,
                    "anomaly": score > threshold,
                    "threshold": threshold,
                    "method": name,
                }
        return outputs

    def _method(self, request: Request, index: int) -> str:
        wanted = len(self._settings.features)
        if len(request.features) != wanted:
            raise refuse(
                index,
                "features",
                f"features has {len(request.features)} numbers; this model takes {wanted}:"
                f" {', '.join(self._settings.features)}.",
            )
        name = request.method or self._settings.default
        if name not in self._detectors:
            known = ", ".join(self._detectors)
            raise refuse(index, "method", f"method is {name!r}; this model knows {known}.")
        return name


def load(folder: Path) -> AnomalyDetector:
    """The loader that manifests name."""
    settings = Settings.model_validate_json((folder / FILE).read_bytes())
    if settings.default not in settings.methods:
        raise ConfigError(f"{FILE}: the default method {settings.default!r} is not there.")
    detectors = {name: _detector(name, settings, folder) for name in settings.methods}
    return AnomalyDetector(settings, detectors)


def _detector(name: str, settings: Settings, folder: Path) -> Detector:
    count = len(settings.features)
    arrays = {key: np.array(row) for key, row in settings.methods[name].arrays.items()}
    if any(len(row) != count for row in arrays.values()):
        raise ConfigError(f"{FILE}: {name} needs {count} numbers a row, one for each feature.")
    try:
        match name:
            case "forest":
                return Forest.read(folder / FOREST, count)
            case "autoencoder":
                from safetensors.torch import load_file

                network = autoencoder_network(settings.autoencoder)
                network.double().load_state_dict(load_file(folder / AUTOENCODER))
                return Autoencoder(network, arrays["center"], arrays["spread"])
            case "zscore" | "grubbs":
                return Distance(center=arrays["center"], spread=arrays["spread"])
            case "iqr":
                return Fence(low=arrays["low"], high=arrays["high"])
    except KeyError as error:
        raise ConfigError(f"{FILE}: {name} lacks {error}.") from error
    raise ConfigError(f"{FILE} names an unknown method {name!r}.")


def _array(values: NDArray[Any], kind: type) -> NDArray[Any]:
    return np.ascontiguousarray(values, dtype=kind)
