"""The model of a run: loaded, given its adapter, and written as an artifact.

=========  =========================================================================
adapter    what the artifact holds
=========  =========================================================================
lora       ``adapter_config.json``, ``adapter_model.safetensors``: PEFT's own format;
           ``base_model_name_or_path`` is the source that ``models.sources.fetch`` takes
none       a whole model: ``config.json``, ``model.safetensors``
both       the tokenizer, with the chat template that was learned with
=========  =========================================================================
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from models.errors import ConfigError
from train.recipes.llm.config import LlmConfig, ModelConfig
from train.recipes.llm.frozen import exchange_dropout

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Weights = Mapping[str, torch.Tensor]
"""Trained parameters by name, whole."""


@dataclass(slots=True, eq=False)
class Model:
    """A causal LM and what is trained of it."""

    network: Any
    """The Hugging Face model, or PEFT's wrapper of it."""
    tokenizer: Any
    config: ModelConfig
    dtype: torch.dtype
    """Products are computed in it."""

    @property
    def causal_lm(self) -> Any:
        """Without PEFT's wrapper, its layers still in place."""
        return self.network if self.config.adapter == "none" else self.network.get_base_model()

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def without_adapter(self) -> AbstractContextManager[object]:
        """Inside, the base model answers."""
        if self.config.adapter == "none":
            raise ConfigError("a model that is trained whole has no base beside it")
        context: AbstractContextManager[object] = self.network.disable_adapter()
        return context

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def save(self, folder: Path, weights: Weights) -> None:
        """Write the artifact: ``weights`` in place of those the network has now."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.adapter == "none":
            self._save_whole(folder, weights)
        else:
            self._save_adapter(folder, weights)
        self.tokenizer.save_pretrained(folder)

    def _save_adapter(self, folder: Path, weights: Weights) -> None:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(
            self.network, state_dict=dict(weights), save_embedding_layers=False
        )
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config = self.network.peft_config["default"].to_dict()
        config |= {"base_model_name_or_path": self.config.source, "inference_mode": True}
        (folder / "adapter_config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n"
        )

    def _save_whole(self, folder: Path, weights: Weights) -> None:
        state = {name: tensor.detach().cpu() for name, tensor in weights.items()}
        for name, tensor in self.network.state_dict().items():
            state.setdefault(name, tensor)  # buffers, and the second name of tied weights
        self.network.save_pretrained(folder, state_dict=state)


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)  # in one order, so that equal adapters have equal files
    return str(value)


def load(config: LlmConfig, device: torch.device, base: Path | None = None) -> Model:
    """The base model with a fresh adapter; the same on every worker.

    Args:
        base: where the driver has the artifact that ``model.source`` names; other machines may
            not have it there.

    Raises:
        ConfigError: no such model, or one that this machine cannot train so.
    """
    settings = config.model
    dtype = _dtype(settings, device)
    network, tokenizer = _base(settings, dtype, device, base)
    if settings.adapter != "none":
        network = _with_adapter(network, config)
        if device.type == "cpu":
            exchange_dropout(network)
    network.to(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    model = Model(network=network, tokenizer=tokenizer, config=settings, dtype=dtype)
    if settings.activation_checkpointing:
        model.causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    return model


def read(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """An artifact of this recipe as one network in fp32, and its tokenizer.

    An adapter is added to the weights of its base.

    Raises:
        ConfigError: there is no such model, or no such base.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return _base(ModelConfig(source=str(folder), adapter="none"), torch.float32, device)
    base = json.loads(file.read_text())["base_model_name_or_path"]
    network, tokenizer = _base(ModelConfig(source=base), torch.float32, device)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted: Any = PeftModel.from_pretrained(network, folder)
        return adapted.merge_and_unload(), tokenizer


def _dtype(settings: ModelConfig, device: torch.device) -> torch.dtype:
    if settings.precision != "auto":
        return PRECISIONS[settings.precision]
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _base(
    settings: ModelConfig, dtype: torch.dtype, device: torch.device, base: Path | None = None
) -> tuple[Any, Any]:
    if settings.adapter == "qlora" and device.type != "cuda":
        raise ConfigError(
            "model.adapter qlora needs a CUDA device (four-bit weights of bitsandbytes),"
            f" and this run is on {device.type}; use lora"
        )
    if settings.source == "tiny":
        from train.recipes.llm.tiny import make

        return make()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from models.sources import fetch

    logging.disable_progress_bar()  # it would write into the run's own

    source = settings.source if base is None or not base.is_dir() else str(base)
    folder = fetch(source, sha256=settings.sha256)
    # Weights that are trained are fp32, whatever the products are computed in.
    options: dict[str, Any] = {"dtype": torch.float32 if settings.adapter == "none" else dtype}
    if settings.adapter == "qlora":
        options |= _four_bits(dtype, device)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.source {settings.source} holds no causal language model: {error}"
        ) from error
    return network, tokenizer


def _four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ConfigError("model.adapter qlora needs pip install bitsandbytes, and a GPU")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantisation, "device_map": {"": device.index or 0}}


def _with_adapter(network: Any, config: LlmConfig) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT asks the hub about base models
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    settings = config.model.lora
    if config.model.adapter == "qlora":
        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    targets = settings.targets
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by an old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(config.seed)
        try:
            return get_peft_model(network, lora)
        except ValueError as error:
            raise ConfigError(f"model.lora: {error}") from error
