"""What a person may set, and what is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from train.recipes.llm import RECIPE, LlmConfig


def test_defaults_are_those_of_the_specification() -> None:
    lora = LlmConfig().model.lora
    assert (lora.r, lora.alpha, lora.dropout) == (16, 32, 0.05)


def test_configurations_round_trip() -> None:
    for config in (LlmConfig(), RECIPE.smoke):
        assert LlmConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"training": {"batch_size": 3, "micro_batch_size": 2}}, "not a multiple of"),
        (
            {"model": {"adapter": "none"}, "training": {"objective": "dpo"}},
            "the base without its adapter is the reference",
        ),
        (
            {"data": {"format": "chat"}, "training": {"objective": "dpo"}},
            "needs preference pairs",
        ),
        ({"data": {"format": "preference"}}, "needs training.objective dpo"),
        ({"model": {"lora": {"rank": 4}}}, "Extra inputs are not permitted"),
    ],
)
def test_contradictions_are_refused(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        LlmConfig.model_validate(tree)
    assert why in str(refusal.value)
