"""Attention rollout by hand, and on a transformer of the library's."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from train.recipes.explain.attention import LENGTH, WORDS, rollout, sentences


def test_two_layers_by_hand() -> None:
    first = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    second = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = rollout([first[None, None], torch.stack([second, second])[None]])
    # half attention, half what was already there: (first + 1) / 2, then (second + 1) / 2
    assert found.tolist() == [[[1.0, 0.0], [0.625, 0.375]]]


def test_rows_of_a_causal_language_model_add_up_and_look_back_only() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        told = model(torch.arange(7)[None], output_attentions=True)
    found = rollout(told.attentions)
    assert found.shape == (1, 7, 7)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 7))
    assert found.triu(1).abs().max() == 0


def test_the_marked_word_is_the_answer() -> None:
    words, place, answer = sentences(50, torch.Generator().manual_seed(0))
    assert words.shape == (50, LENGTH + 1)
    assert ((words[:, :LENGTH] >= WORDS).sum(1) == 1).all()
    assert (words[torch.arange(50), place] == answer + WORDS).all()
