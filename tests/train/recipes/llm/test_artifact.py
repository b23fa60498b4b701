"""What a run leaves is what PEFT and transformers load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.recipes.llm.experiment import config, train
from train.context import Context
from train.recipes.llm import RECIPE, data, tiny
from train.recipes.llm.config import LlmConfig
from train.recipes.llm.encoding import IGNORE

pytestmark = pytest.mark.integration


def held_out_loss(network: Any, settings: LlmConfig) -> float:
    """By the model's own forward pass, a document at a time."""
    total, count = 0.0, 0
    network.eval()
    for (example,) in data.load(settings, tiny.tokenizer()).held_out:
        tokens = torch.from_numpy(example.tokens).long()
        targets = torch.from_numpy(example.targets).long()
        with torch.no_grad():
            logits = network(input_ids=tokens[None]).logits[0]
        total += float(cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"))
        count += example.trained
    return total / count


def test_peft_loads_the_adapter_and_finds_the_loss_that_was_reported(
    text: Path, tmp_path: Path
) -> None:
    settings = config(text, steps=20)
    metrics, _ = train(settings, tmp_path)
    artifact = tmp_path / "artifact"
    names = {path.name for path in artifact.iterdir()}
    assert {name for name in names if name.startswith("adapter_")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not [name for name in names if name.startswith("model")], "the base is not copied"
    assert_has_the_tokenizer(artifact)
    written = json.loads((artifact / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"]) == ("tiny", 16)
    assert written["target_modules"] == sorted(written["target_modules"])
    base, _ = tiny.make()
    assert held_out_loss(base, settings) == pytest.approx(metrics["base_loss"], rel=1e-5)
    adapted = PeftModel.from_pretrained(base, artifact)
    assert held_out_loss(adapted, settings) == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["perplexity_ratio"] < 0.9


def test_transformers_loads_a_model_that_was_trained_whole(text: Path, tmp_path: Path) -> None:
    settings = config(text, model={"adapter": "none"}, steps=20)
    metrics, _ = train(settings, tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    assert held_out_loss(network, settings) == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert metrics["perplexity_ratio"] < 0.7
    assert_has_the_tokenizer(tmp_path / "artifact")


def assert_has_the_tokenizer(artifact: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    assert tokenizer("ab")["input_ids"] == tiny.tokenizer()("ab")["input_ids"]
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE


def test_preferences_are_learned(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}:", "chosen": " yes", "rejected": " no"} for i in range(20)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(file, objective="dpo", steps=12, optimiser={"learning_rate": 2e-2})
    metrics, losses = train(settings, tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5), "policy and reference are one"
    assert metrics["base_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["eval_loss"] < 0.6
    assert metrics["eval_accuracy"] == 1
    assert "perplexity" not in metrics


def test_bad_rows_are_counted_and_listed(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    lines = [json.dumps(good | {"n": i}) for i in range(12)]
    lines = [line.replace('"q"', f'"q{i}"') for i, line in enumerate(lines)]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join([*lines[:5], "{oops", *lines[5:]]) + "\n")
    settings = config(file, steps=2)
    skipping = settings.model_copy(
        update={"data": settings.data.model_copy(update={"on_bad_row": "skip"})}
    )
    metrics, _ = train(skipping, tmp_path / "run")
    assert metrics["rows_skipped"] == 1
    listed = json.loads((tmp_path / "run" / "bad_rows.jsonl").read_text())
    assert listed["where"] == f"{file}:6"


def test_the_smoke_run_passes_its_gates(tmp_path: Path) -> None:
    metrics = RECIPE.run(RECIPE.smoke, Context(out=tmp_path))
    for name, gate in RECIPE.smoke_gates.items():
        assert gate.holds(metrics[name]), (name, metrics[name])
