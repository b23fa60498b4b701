"""What layers in int8 are made by: found out by reading some text, and kept for the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from deployments.engines.linears import Groups, PackedLinear, pack_linears
from models import durable
from models import int8 as weights
from models.sources import default_cache

_log = logging.getLogger(__name__)

MOST_LOST = 0.015
"""Of the outputs of a kind of layers by inputs of 8 bits (``int8.observed_losses``); one that loses
more takes 16. Those behind a gate do: what they get has few large numbers.
"""
_OURS = ("calibration", "int8", "kernels", "linears", "precision")
CODE = (*(Path(__file__).with_name(f"{name}.py") for name in _OURS), Path(weights.__file__))
"""That finds out."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of one model; layers by their names."""

    largest: Mapping[str, torch.Tensor]
    """``[in_features]``: the largest magnitude of each input channel."""
    fine: frozenset[str]
    """Whose activations take 16 bits."""
    margin: float
    """Of the output layer, see ``Int8Head``."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How a model in int8 stands to the same in float32."""

    perplexity: float
    """Of int8 : of float32."""
    agreement: float
    """Share of positions at which the likeliest next token is the same."""

    def __str__(self) -> str:
        return f"perplexity {self.perplexity - 1:+.2%}, the same next token in {self.agreement:.1%}"


@torch.inference_mode()
def calibrated(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> Calibration | None:
    """Args:
        model: float32, with its own attention.
        windows: tokens that are read together.

    Returns:
        ``None``: there is nothing that int8 could take the place of.
    """
    # Here, for Numba takes 70 MB, which whoever computes elsewhere does without.
    from deployments.engines.int8 import (
        margin_of,
        observed_inputs,
        observed_losses,
        observed_ranges,
    )

    head = model.get_output_embeddings()
    first, *others = (torch.tensor([each]) for each in windows)
    with observed_ranges(model) as largest:
        with observed_inputs(head) as inputs:
            model(input_ids=first, use_cache=False)
        for each in others:
            model(input_ids=each, use_cache=False, logits_to_keep=1)
    if not largest.keys() - {head}:
        return None
    with observed_losses(model, largest) as losses:
        model(input_ids=first, use_cache=False, logits_to_keep=1)
    names = {module: name for name, module in model.named_modules()}
    by_kind: dict[str, list[nn.Linear]] = {}
    for linear in largest:
        by_kind.setdefault(_kind(names[linear]), []).append(linear)
    fine = [
        names[linear]
        for alike in by_kind.values()
        if sum(losses.get(linear, 0.0) for linear in alike) > MOST_LOST * len(alike)
        for linear in alike
    ]
    return Calibration(
        largest={names[linear]: each for linear, each in largest.items()},
        fine=frozenset(fine),
        margin=margin_of(head, torch.cat(inputs)) if head in largest else 0.0,
    )


def _kind(name: str) -> str:
    """The same in every layer: ``mlp.down_proj``."""
    return ".".join(name.split(".")[-2:])


@torch.inference_mode()
def to_int8(
    model: PreTrainedModel, groups: Groups, by: Calibration
) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Compute the model's linear layers in int8.

    Args:
        groups: layers to compute as one, from ``observed_groups``.

    Returns:
        what to ``put_back``.
    """
    from deployments.engines.int8 import Int8Head, Int8Linear

    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}

    def make(linears: Sequence[nn.Linear]) -> nn.Module:
        name = names[linears[0]]
        if name not in by.largest:
            return PackedLinear(*linears)
        if head in linears:
            return Int8Head(linears[0], margin=by.margin)
        bits = 16 if any(names[each] in by.fine for each in linears) else 8
        return Int8Linear(*linears, largest=by.largest[name], bits=bits)

    return pack_linears(model, groups, make)


class Kept:
    """The calibration of the model in a folder, on this machine's disk.

    Args:
        folder: with other files in it, it is another model.
        window: tokens that are read together.
    """

    def __init__(self, folder: Path, window: int) -> None:
        code = [path.read_bytes() for path in CODE]
        versions = (sys.version, torch.__version__, transformers.__version__)
        files = [
            (path.name, (state := path.stat()).st_size, state.st_mtime_ns)
            for path in sorted(folder.iterdir())
        ]
        known = json.dumps([*versions, files, window]).encode()
        self._key = hashlib.sha256(known + b"".join(code)).hexdigest()
        """Found out under other circumstances it is to be found out again."""
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
        self._path = default_cache() / "calibrated" / f"{name}.safetensors"

    def read(self) -> tuple[Calibration, Quality] | None:
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                about = json.loads(file.metadata()["calibration"])
                if about["key"] != self._key:
                    return None
                largest = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            calibration = Calibration(largest, frozenset(about["fine"]), about["margin"])
            return calibration, Quality(**about["quality"])
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            _log.warning("%s is not what was kept there: %r", self._path, error)
            return None

    def write(self, calibration: Calibration, quality: Quality) -> None:
        """A disk that takes nothing is no reason to stop: the next start finds out again."""
        about = {
            "key": self._key,
            "fine": sorted(calibration.fine),
            "margin": calibration.margin,
            "quality": asdict(quality),
        }
        tensors = {name: each.clone() for name, each in calibration.largest.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            durable.write(self._path, save(tensors, {"calibration": json.dumps(about)}))
        except OSError as error:
            _log.warning("%s cannot be kept: %s", self._path, error)
