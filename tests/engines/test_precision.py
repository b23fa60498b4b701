"""int8 is taken where the model then answers as well, and left where it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deployments.config import EngineConfig
from deployments.engines import precision
from deployments.engines.int8 import Int8Head, Int8Linear
from deployments.engines.linears import PackedLinear, as_linear, observed_groups
from deployments.engines.precision import WINDOW, as_good, house_text, int8_if_as_good
from deployments.engines.runner import Runner
from models.errors import ConfigError

Tiny = Callable[[str], Path]
TEXT = [(7 * n * n + 3 * n) % 251 for n in range(20 * WINDOW)]


def loaded(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    as_linear(model)
    return model


def kinds(model: nn.Module) -> set[type]:
    wanted = (nn.Linear, PackedLinear, Int8Linear)
    return {type(module) for module in model.modules() if isinstance(module, wanted)}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_all_but_the_output_layer_is_exchanged(tiny: Tiny, kind: str) -> None:
    model = loaded(tiny(kind))
    text = [token % model.config.vocab_size for token in TEXT]
    with torch.inference_mode(), observed_groups(model) as groups:
        model(torch.arange(8)[None], use_cache=False)
    before = model(torch.tensor([text[:50]])).logits
    quality = int8_if_as_good(model, groups, lambda: text, window=64)
    assert quality is not None
    assert as_good(quality)
    assert nn.Linear not in kinds(model)
    assert Int8Linear in {type(group) for group in _packed(model)}
    assert isinstance(model.get_output_embeddings(), Int8Head)
    with torch.inference_mode():
        after = model(torch.tensor([text[:50]])).logits
    assert (after - before).abs().max() < 0.2 * before.abs().max()


def _packed(model: nn.Module) -> list[nn.Module]:
    groups = [m._group.packed for m in model.modules() if hasattr(m, "_group")]
    return [*groups, *(m for m in model.modules() if isinstance(m, Int8Linear))]


def test_a_model_that_answers_worse_is_put_back(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(llama)
    before = {name: type(module) for name, module in model.named_modules()}
    monkeypatch.setattr(precision, "LEAST_AGREEMENT", 1.1)
    quality = int8_if_as_good(model, (), lambda: TEXT)
    assert quality is not None
    assert not as_good(quality)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_without_text_nothing_is_judged(llama: Path) -> None:
    assert int8_if_as_good(loaded(llama), (), lambda: TEXT[:900]) is None


def test_the_house_text_is_enough(tiny: Tiny, tmp_path: Path) -> None:
    assert len(house_text(tiny("llama"))) == 20 * WINDOW
    assert house_text(tmp_path) == []


def test_int8_that_was_asked_for_is_refused_where_it_answers_worse(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "MOST_PERPLEXITY", 0.0)
    monkeypatch.setattr("deployments.engines.runner.int8_units", lambda: True)
    with pytest.raises(ConfigError, match=r"does not answer as well in int8 \(perplexity"):
        Runner(llama, EngineConfig(slots=2, dtype="int8"))
    runner = Runner(llama, EngineConfig(slots=2, dtype="auto"))
    assert Int8Linear not in kinds(runner.model)
    assert "computes in float32; in int8: perplexity" in caplog.text
    runner.close()


def test_auto_goes_by_the_processor(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for units in (False, True):
        monkeypatch.setattr("deployments.engines.runner.int8_units", lambda has=units: has)
        runner = Runner(llama, EngineConfig(slots=2, dtype="auto"))
        assert any(isinstance(m, Int8Linear) for m in _packed(runner.model)) is units
        runner.close()
