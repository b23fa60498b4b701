"""Adapters for tests: random ones by PEFT itself or by hand, and what PEFT answers with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.engines.reference import Reference

LAYERS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
"""Every linear layer but the head, by its last name."""


@contextmanager
def peft_at_work() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.23 for an attribute that has a new name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def recipes(kind: str) -> dict[str, dict[str, Any]]:
    """Adapters that differ in what they change, in rank and in scale."""
    layers = LAYERS[kind]
    odd = {"rank_pattern": {layers[-1]: 11}, "alpha_pattern": {f".*1.*{layers[-1]}": 3}}
    common = {"fan_in_fan_out": kind == "gpt2"}
    return {
        "narrow": {"target_modules": [layers[0]], "r": 4, "lora_alpha": 16, **common},
        "wide": {"target_modules": layers, "r": 8, "lora_alpha": 8, "use_rslora": True, **common},
        "odd": {"target_modules": layers[1:], "r": 3, "lora_alpha": 6, **odd, **common},
        "deep": {"target_modules": layers, "r": 20, "lora_alpha": 20, **common},
    }


def make(base: Path, folder: Path, *, seed: int, **config: Any) -> Path:
    """A random adapter of the model in ``base``, written by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    with peft_at_work():
        # Not the usual beginning, where an adapter changes nothing.
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **config))
        adapted.save_pretrained(folder)
    return folder


def write(folder: Path, weights: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter by hand: tensors by their key without PEFT's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{key}": tensor.contiguous() for key, tensor in weights.items()},
        folder / "adapter_model.safetensors",
    )
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


class AdaptedReference(Reference):
    """What PEFT answers with an adapter, in float64."""

    def __init__(self, base: Path, adapter: Path) -> None:
        super().__init__(base)
        with peft_at_work():
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()


class Wardrobe:
    """Models of one architecture in many dresses: folders by adapter, and what PEFT answers."""

    def __init__(self, base: Path, folder: Path, kind: str) -> None:
        self.base = base
        self.folders = {
            name: make(base, folder / name, seed=seed, **config)
            for seed, (name, config) in enumerate(recipes(kind).items())
        }
        self._references: dict[str | None, Reference] = {}

    def reference(self, adapter: str | None) -> Reference:
        if adapter not in self._references:
            self._references[adapter] = (
                Reference(self.base)
                if adapter is None
                else AdaptedReference(self.base, self.folders[adapter])
            )
        return self._references[adapter]
