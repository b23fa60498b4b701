"""Language models with weights of 8 bits: what is kept, what is refused, what is answered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from models.errors import ConfigError, InvalidInput
from models.int8 import quantise
from models.predictors import int8_lm
from train.recipes.llm import tiny


def model(tied: bool) -> tuple[Any, Any]:
    network, tokenizer = tiny.make()
    if tied:
        config = AutoConfig.for_model(**{**network.config.to_dict(), "tie_word_embeddings": True})
        torch.manual_seed(1)
        network = AutoModelForCausalLM.from_config(config)
    return network.eval(), tokenizer


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    int8_lm.save(tmp_path, *model(request.param))
    return tmp_path


def test_rows_are_rounded_to_the_next_of_255_steps() -> None:
    matrix = torch.randn(7, 50) * torch.logspace(-3, 3, 7)[:, None]
    matrix[3] = 0
    whole, scale = quantise(matrix)
    assert whole.dtype == torch.int8
    off = (whole * scale[:, None] - matrix).abs()
    assert (off <= 0.5001 * scale[:, None]).all()
    assert (scale[matrix.any(1)] == matrix.abs().amax(1)[matrix.any(1)] / 127).all()


@pytest.mark.parametrize("tied", [False, True])
def test_the_file_is_a_quarter_and_the_network_nearly_the_same(tied: bool, tmp_path: Path) -> None:
    network, tokenizer = model(tied)
    int8_lm.save(tmp_path, network, tokenizer)
    kept = load_file(tmp_path / int8_lm.WEIGHTS)
    for name, weight in network.named_parameters():
        assert kept[name].dtype == (torch.int8 if weight.dim() == 2 else torch.float32)
    whole = sum(4 * weight.numel() for weight in network.parameters())
    assert (tmp_path / int8_lm.WEIGHTS).stat().st_size < whole / 3
    smaller, _ = int8_lm.read(tmp_path)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        truth, found = network(ids).logits, smaller(ids).logits
    assert 0 < (found - truth).abs().max() < 0.05 * truth.abs().max()
    if tied:
        head, words = smaller.get_output_embeddings(), smaller.get_input_embeddings()
        assert head.weight.data_ptr() == words.weight.data_ptr()


def test_a_text_is_as_probable_as_the_network_says(folder: Path) -> None:
    network, tokenizer = int8_lm.read(folder)
    texts = ["The capital of France is Paris.", "äö", "ab"]
    answers: Any = int8_lm.load(folder).predict_batch([{"text": text} for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            told = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        truth = sum(float(told[i, ids[i + 1]]) for i in range(len(ids) - 1))
        assert answer["tokens"] == len(ids)
        assert answer["log_probability"] == pytest.approx(truth, rel=1e-4)
        assert answer["perplexity"] == pytest.approx(math.exp(-truth / (len(ids) - 1)), rel=1e-4)


@pytest.mark.parametrize("text", ["", "a", "a" * 1025, 3, None])
def test_texts_of_no_or_too_many_tokens_are_refused(folder: Path, text: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        int8_lm.load(folder).predict_batch([{"text": "ab"}, {"text": text}])
    assert caught.value.details["index"] == 1


def test_files_that_do_not_fit_are_refused(folder: Path) -> None:
    path = folder / int8_lm.WEIGHTS
    kept = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({key: value for key, value in kept.items() if not key.startswith(name)}, path)
    with pytest.raises(ConfigError, match=r"not of config.json: .*up_proj"):
        int8_lm.load(folder)
    save_file({key: value for key, value in kept.items() if key != name + int8_lm.SCALE}, path)
    with pytest.raises(ConfigError, match="no model that can be used"):
        int8_lm.load(folder)
    path.write_bytes(b"none")
    with pytest.raises(ConfigError, match="no model that can be used"):
        int8_lm.load(folder)
