"""PEFT's files of a LoRA adapter → weights that the engine adds; what it cannot add is refused.

``adapter_config.json`` says the scale of each layer, ``adapter_model.safetensors`` holds
``base_model.model.LAYER.lora_A.weight [rank, inputs]`` and ``lora_B [outputs, rank]``. Which
layers an adapter changes is read off the weights, so ``target_modules`` needs no second
interpretation here. A setting that we do not know must be off, or the adapter is refused: it
might compute something else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator
from safetensors import SafetensorError, safe_open

from deployments.engines.adapters import Adapter
from models.errors import InvalidInput

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NO_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "runtime_config"),
    # which layers were chosen: the weights say
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # how the weights began, and how they were trained
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    # matter only beside another setting, which is then refused
    *("megatron_core", "qalora_group_size"),
}
"""Settings that do not change what a trained adapter computes."""

_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A linear layer of the model that adapters may change."""

    inputs: int
    outputs: int


class PeftConfig(BaseModel):
    """``adapter_config.json``, as far as it matters here."""

    model_config = ConfigDict(extra="allow")

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: float = Field(allow_inf_nan=False)
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, float] = {}
    bias: Literal["none"] = "none"
    # Other ways to begin (PiSSA, OLoRA, CorDA, LoftQ …) change the base's weights as well.
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] = True

    @field_validator("rank_pattern", "alpha_pattern", "init_lora_weights", mode="before")
    @classmethod
    def _absent(cls, value: object, info: Any) -> object:
        return cls.model_fields[info.field_name].default if value is None else value

    def rank(self, layer: str) -> int:
        return self.rank_pattern.get(_matching(self.rank_pattern, layer), self.r)

    def scale(self, layer: str) -> float:
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, layer), self.lora_alpha)
        rank = self.rank(layer)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


class LoraFile:
    """An adapter on disk, checked against the model; weights are read by ``read``.

    Args:
        name: the adapter's, for messages.
        folder: as PEFT's ``save_pretrained`` writes it.
        targets: the model's layers, by name.
        max_rank: the largest that is accepted.
        dtype, device: of the model.

    Raises:
        InvalidInput: what was found, and what would be right.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        targets: Mapping[str, Target],
        *,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._name = name
        self._dtype = dtype
        self._device = device
        self._path = folder / WEIGHTS
        self._config = self._read_config(folder)
        self._shapes = self._read_shapes(folder)
        self._layers = self._pairs()
        for layer in self._layers:
            self._check(layer, targets, max_rank)
        self.rank = max(self._config.rank(layer) for layer in self._layers)
        self.bytes = sum(map(math.prod, self._shapes.values())) * dtype.itemsize

    def read(self) -> Adapter:
        weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        try:
            with safe_open(self._path, framework="pt") as file:
                for layer in self._layers:
                    a = self._own(file.get_tensor(_key(layer, "A")))
                    b = self._own(file.get_tensor(_key(layer, "B")).T)
                    b *= self._config.scale(layer)
                    # A NaN of one adapter must not reach the rows of another through a mask.
                    if not (a.isfinite().all() and b.isfinite().all()):
                        raise self._refused(f"its weights of {layer} are not all finite numbers")
                    weights[layer] = a, b
        except (OSError, SafetensorError) as error:
            raise self._refused(f"{WEIGHTS} cannot be read: {error}") from error
        return Adapter(name=self._name, rank=self.rank, bytes=self.bytes, weights=weights)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy: the file may change, and its mapping should go."""
        made = torch.empty(tensor.shape, dtype=self._dtype, device=self._device)
        return made.copy_(tensor)

    def _read_config(self, folder: Path) -> PeftConfig:
        try:
            given = json.loads((folder / CONFIG).read_bytes())
            config = PeftConfig.model_validate(given)
        except OSError as error:
            raise self._refused(f"{CONFIG} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"][:1])) or CONFIG
            found = repr(first["input"]) if first["type"] != "missing" else "nothing"
            raise self._refused(f"{where} is {found:.80}: {first['msg']}") from None
        except ValueError as error:
            raise self._refused(f"{CONFIG} is no JSON: {error}") from error
        more = {**(config.model_extra or {})}
        on = sorted(key for key, value in more.items() if value and key not in NO_EFFECT)
        if on:
            raise self._refused(
                f"it uses {', '.join(f'{key}={more[key]!r:.40}' for key in on)};"
                " plain LoRA is served"
            )
        return config

    def _read_shapes(self, folder: Path) -> dict[str, tuple[int, ...]]:
        if not self._path.is_file():
            others = sorted(path.name for path in folder.glob("adapter_model*"))
            raise self._refused(f"{WEIGHTS} is missing" + (f" (found: {others})" if others else ""))
        try:
            with safe_open(self._path, framework="pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise self._refused(f"{WEIGHTS} cannot be read: {error}") from error

    def _pairs(self) -> list[str]:
        """Names of the layers it changes."""
        layers: dict[str, set[str]] = {}
        for key in self._shapes:
            match = _KEY.fullmatch(key)
            if match is None:
                raise self._refused(f"{WEIGHTS} has {key!r}; only linear layers can be adapted")
            layers.setdefault(match["layer"], set()).add(match["side"])
        for layer, sides in layers.items():
            if sides != {"A", "B"}:
                raise self._refused(f"{layer} has lora_{sides.pop()} without its counterpart")
        if not layers:
            raise self._refused(f"{WEIGHTS} is empty")
        return list(layers)

    def _check(self, layer: str, targets: Mapping[str, Target], max_rank: int) -> None:
        target = targets.get(layer)
        if target is None:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
            raise self._refused(
                f"it changes {layer!r}; what can be changed in this model are the layers {kinds},"
                f" for example {next(iter(targets), None)!r}"
            )
        a, b = self._shapes[_key(layer, "A")], self._shapes[_key(layer, "B")]
        try:
            rank = self._config.rank(layer)
            self._config.scale(layer)
        except re.error as error:
            raise self._refused(f"rank_pattern or alpha_pattern is no pattern: {error}") from error
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise self._refused(
                f"{layer} has lora_A {list(a)} and lora_B {list(b)}; {CONFIG} says rank {rank}"
            )
        if (a[1], b[0]) != (target.inputs, target.outputs):
            raise self._refused(
                f"{layer} goes from {a[1]} to {b[0]} features, and in this model from"
                f" {target.inputs} to {target.outputs}; the adapter was made for another one"
            )
        if rank > max_rank:
            raise self._refused(f"{layer} has rank {rank}; engine.adapters.max_rank is {max_rank}")

    def _refused(self, reason: str) -> InvalidInput:
        return InvalidInput(f"The adapter {self._name!r} cannot be served: {reason}.")


def _key(layer: str, side: str) -> str:
    return f"base_model.model.{layer}.lora_{side}.weight"


def _matching(patterns: Iterable[str], layer: str) -> str:
    """The first pattern that fits a layer's name, as PEFT looks it up."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), layer)
