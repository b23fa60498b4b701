"""A fine-tuned model in int8: what is made small is the artifact that was given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from models.errors import ConfigError
from models.predictors import int8_lm
from tests.train.recipes.llm.experiment import config, train, write_text
from train.context import Context
from train.recipes.compression_llm import RECIPE, CompressionLlm, judge
from train.recipes.llm import data, model, tiny

pytestmark = [
    pytest.mark.integration,
    # PEFT 0.21 asks transformers 5.23 by an old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_what_is_compressed_is_the_artifact_that_was_given(
    adapter: str, text: Path, tmp_path: Path
) -> None:
    settings = config(text, model={"adapter": adapter}, steps=20)
    trained, _ = train(settings, tmp_path / "run")
    given = tmp_path / "run" / "artifact"
    context = Context(out=tmp_path / "out", inputs={"causal-lm": given})
    asked = CompressionLlm(
        text=str(text),
        held_out=settings.data.held_out,
        tokens=100_000,
        sequence_length=settings.training.sequence_length,
    )
    metrics = RECIPE.run(asked, context)
    assert metrics["perplexity_before"] == pytest.approx(trained["perplexity"], rel=1e-4)
    for name in ("perplexity_ratio", "size_ratio"):
        assert RECIPE.smoke_gates[name].holds(metrics[name]), (name, metrics[name])
    # What was measured is what is served.
    held_out = [each for unit in data.load(settings, tiny.tokenizer()).held_out for each in unit]
    served, _ = int8_lm.read(context.artifact)
    assert math.exp(judge(served, held_out).loss) == pytest.approx(metrics["perplexity"], rel=1e-4)


def test_an_adapter_is_read_as_peft_would(text: Path, tmp_path: Path) -> None:
    train(config(text, steps=20), tmp_path)
    network, tokenizer = model.read(tmp_path / "artifact", torch.device("cpu"))
    base, _ = tiny.make()
    ids = torch.arange(60)[None]
    with torch.no_grad():
        plain = base(ids).logits
        theirs: Any = PeftModel.from_pretrained(base, tmp_path / "artifact").eval()
        told = theirs(ids).logits
        found = network.eval()(ids).logits
    torch.testing.assert_close(found, told, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.1
    assert tokenizer("ab")["input_ids"] == tiny.tokenizer()("ab")["input_ids"]


def test_an_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(ConfigError, match="gone"):
        model.read(tmp_path, torch.device("cpu"))


def test_judging_counts_what_is_answered_for_alone(text: Path) -> None:
    network, _ = tiny.make()
    examples = [
        each
        for unit in data.load(config(text, steps=1), tiny.tokenizer()).held_out[:2]
        for each in unit
    ]
    found = judge(network, examples)
    assert found.loss == pytest.approx(math.log(257), rel=0.1)  # it knows nothing
    assert [len(one) for one in found.likeliest] == [len(one) for one in examples]
