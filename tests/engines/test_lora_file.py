"""Which adapters are accepted, how they are scaled, and what the others are told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from deployments.engines.lora_file import LoraFile, Target
from models.errors import InvalidInput
from tests.engines import adapters

TARGETS = {f"layers.{i}.{kind}": Target(inputs=6, outputs=4) for i in (0, 1) for kind in "qv"}


def pair(layer: str = "layers.0.q", rank: int = 2, **changes: Any) -> dict[str, torch.Tensor]:
    a, b = torch.randn(rank, 6), torch.randn(4, rank)
    return {f"{layer}.lora_A.weight": changes.get("a", a), f"{layer}.lora_B.weight": b}


def opened(folder: Path, *, max_rank: int = 16, dtype: torch.dtype = torch.float64) -> LoraFile:
    return LoraFile(
        "mine", folder, TARGETS, max_rank=max_rank, dtype=dtype, device=torch.device("cpu")
    )


def test_weights_and_scales(tmp_path: Path) -> None:
    weights = {**pair(rank=2), **pair("layers.1.q", rank=4), **pair("layers.1.v", rank=2)}
    patterns = {"rank_pattern": {"1.q": 4}, "alpha_pattern": {r"layers\.\d\.q": 6}}
    for rslora, scales in ((False, (3, 1.5, 2)), (True, (6 / math.sqrt(2), 3, 4 / math.sqrt(2)))):
        folder = adapters.write(tmp_path, weights, use_rslora=rslora, **patterns)
        file = opened(folder)
        adapter = file.read()
        assert adapter.name == "mine"
        assert (file.rank, adapter.rank) == (4, 4)
        assert file.bytes == adapter.bytes == 8 * sum(t.numel() for t in weights.values())
        for layer, scale in zip(("layers.0.q", "layers.1.q", "layers.1.v"), scales, strict=True):
            a, b = adapter.weights[layer]
            assert torch.equal(a, weights[f"{layer}.lora_A.weight"].double())
            expected = weights[f"{layer}.lora_B.weight"].double().T * scale
            assert torch.equal(b, expected)
            assert b.is_contiguous()


def test_half_the_memory_in_half_precision(tmp_path: Path) -> None:
    folder = adapters.write(tmp_path, pair())
    adapter = opened(folder, dtype=torch.bfloat16).read()
    assert adapter.weights["layers.0.q"][0].dtype == torch.bfloat16
    assert adapter.bytes == 2 * (2 * 6 + 4 * 2)


def test_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    weights = pair()
    adapter = opened(adapters.write(tmp_path, weights), dtype=torch.float32).read()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(adapter.weights["layers.0.q"][0], weights["layers.0.q.lora_A.weight"])


def test_what_peft_writes_by_default_is_plain(tmp_path: Path) -> None:
    folder = adapters.write(tmp_path, pair())
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q"], task_type="CAUSAL_LM")
    config.save_pretrained(folder)
    opened(folder)
    for start in ("gaussian", "eva", False):
        adapters.write(tmp_path, pair(), init_lora_weights=start)
        opened(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora=True; plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"something_new": {"x": 1}}, "something_new="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": 0}, "r is 0"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"r": 3}, r"lora_A \[2, 6\] and lora_B \[4, 2\]; .* says rank 3"),
        ({"rank_pattern": {"(": 3}}, "no pattern"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = adapters.write(tmp_path, pair(), **config)
    with pytest.raises(InvalidInput, match=message):
        opened(folder)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "empty"),
        ({"layers.0.q.lora_A.weight": torch.zeros(2, 6)}, "lora_A without its counterpart"),
        (pair("layers.7.q"), r"'layers.7.q'; .* the layers q, v, for example 'layers.0.q'"),
        ({"embed.lora_embedding_A": torch.zeros(2, 6)}, "lora_embedding_A.*only linear layers"),
        ({**pair(), "lm_head.weight": torch.zeros(2)}, "'base_model.model.lm_head.weight'"),
        (pair(a=torch.zeros(2, 8)), "from 8 to 4 features, and in this model from 6 to 4"),
        (pair(a=torch.zeros(2, 6, 1)), r"lora_A \[2, 6, 1\]"),
        (pair(rank=17), "rank 17; engine.adapters.max_rank is 16"),
    ],
)
def test_weights_that_are_refused(
    tmp_path: Path, weights: dict[str, torch.Tensor], message: str
) -> None:
    ranks = [t.shape[0] for key, t in weights.items() if "lora_A" in key]
    folder = adapters.write(tmp_path, weights, r=17 if 17 in ranks else 2)
    with pytest.raises(InvalidInput, match=message):
        opened(folder)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    weights = pair()
    weights["layers.0.q.lora_B.weight"][3, 1] = bad
    with pytest.raises(InvalidInput, match=r"layers.0.q are not all finite"):
        opened(adapters.write(tmp_path, weights)).read()


def test_numbers_that_the_engines_precision_does_not_hold(tmp_path: Path) -> None:
    file = opened(adapters.write(tmp_path, pair(a=torch.full((2, 6), 1e6))), dtype=torch.float16)
    with pytest.raises(InvalidInput, match="not all finite"):
        file.read()


def test_files_that_are_none(tmp_path: Path) -> None:
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            opened(tmp_path)

    refused("adapter_config.json cannot be read: No such file")
    config.write_text("{")
    refused("no JSON")
    config.write_text("[1]")
    refused("adapter_config.json is")
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    refused("lora_alpha is nothing")
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (tmp_path / "adapter_model.bin").touch()
    refused(r"safetensors is missing \(found: \['adapter_model.bin'\]\)")
    weights.write_bytes(b"\0" * 64)
    refused("safetensors cannot be read")
    save_file({"x": torch.zeros(1)}, weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("safetensors cannot be read")
