"""The demo model learns: a margin on real text that it has not seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.recipes.llm.experiment import train
from train.recipes.llm import LlmConfig

MARGIN = 0.95
"""Of the perplexity before."""


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_steps_of_lora_lower_the_perplexity_of_held_out_text(tmp_path: Path) -> None:
    """SmolLM2 on the language reference of Python, two thousand tokens of it."""
    settings = LlmConfig.model_validate(
        {
            "training": {
                "steps": 8,
                "batch_size": 1,
                "sequence_length": 256,
                "evaluate_every": None,
                "optimiser": {"learning_rate": 2e-3, "schedule": "linear"},
            },
            "data": {"evaluation_tokens": 1024},
        }
    )
    metrics, losses = train(settings, tmp_path)
    assert len(losses) == 8
    assert metrics["base_perplexity"] < 60, "the base knows English"
    assert metrics["perplexity_ratio"] < MARGIN
    assert (tmp_path / "artifact" / "adapter_model.safetensors").stat().st_size > 1_000_000
