"""Packed rows have the losses and gradients of their documents alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from models.errors import ConfigError
from train.recipes.llm import tiny
from train.recipes.llm.config import ModelConfig
from train.recipes.llm.encoding import IGNORE, Example, Unit
from train.recipes.llm.model import Model
from train.recipes.llm.objective import Dpo, Row, Supervised

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6))


def gemma() -> Any:
    return GemmaForCausalLM(GemmaConfig(**SIZES))


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                   attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    )  # fmt: skip


ARCHITECTURES = (llama, mistral, gemma, gpt2)


def wrapped(network: Any) -> Model:
    config = ModelConfig(source="tiny", adapter="none")
    return Model(network=network, tokenizer=None, config=config, dtype=torch.float32)


def document(draw: np.random.Generator, length: int) -> Example:
    tokens = draw.integers(0, 257, length).astype(np.int32)
    targets = np.append(tokens[1:], IGNORE).astype(np.int32)
    targets[draw.random(length) < 0.3] = IGNORE
    targets[0] = tokens[1]  # something is always learned
    return Example(tokens, targets)


def own_loss(network: Any, example: Example) -> torch.Tensor:
    """Summed, of one document alone, by the model's own forward pass and attention."""
    tokens = torch.from_numpy(example.tokens.astype(np.int64))
    targets = torch.from_numpy(example.targets.astype(np.int64))
    logits = network(input_ids=tokens[None]).logits[0]
    return cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("make", ARCHITECTURES)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(2, 17), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_a_packed_row_has_the_losses_and_gradients_of_its_documents(
    make: Any, lengths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    network = make().double()
    units: list[Unit] = [
        (document(np.random.default_rng([seed, i]), length),) for i, length in enumerate(lengths)
    ]
    expected = sum((own_loss(network, unit[0]) for unit in units), torch.zeros(()))
    gradients = torch.autograd.grad(expected, list(network.parameters()))
    objective = Supervised(wrapped(network))
    objective.attach(CPU)
    try:
        loss = objective(Row.of(units, CPU))["loss"]
        packed = torch.autograd.grad(loss, list(network.parameters()))
    finally:
        objective.close()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(packed, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert objective.weigh(units) == sum(unit[0].trained for unit in units)


def test_a_document_sees_nothing_of_its_neighbours() -> None:
    """The test above would pass if a difference were below its tolerance; this is exact."""
    torch.manual_seed(0)
    objective = Supervised(wrapped(llama()))
    objective.attach(CPU)
    first, second, other = (document(np.random.default_rng(i), 9) for i in range(3))
    try:
        with torch.no_grad():
            beside = objective.token_losses(Row.of([(first,), (second,)], CPU))
            alone = objective.token_losses(Row.of([(other,), (second,)], CPU))
    finally:
        objective.close()
    assert torch.equal(beside[-second.trained :], alone[-second.trained :])


def test_a_model_whose_head_does_more_is_asked_for_its_logits() -> None:
    class Softened(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 3 * torch.tanh(output.logits / 3)
            return output

    torch.manual_seed(0)
    network = Softened(LlamaConfig(**SIZES, initializer_range=0.5))
    example = document(np.random.default_rng(0), 11)
    expected = own_loss(network, example)
    objective = Supervised(wrapped(network))
    objective.attach(CPU)
    try:
        loss = objective(Row.of([(example,)], CPU))["loss"]
    finally:
        objective.close()
    torch.testing.assert_close(loss, expected)


def test_a_model_that_looks_across_documents_is_refused() -> None:
    class Peeking(LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.norm = Mixing(config.hidden_size)

    class Mixing(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden * 5 + 50 * hidden.cumsum(dim=1)

    torch.manual_seed(0)
    objective = Supervised(wrapped(Peeking(LlamaConfig(**SIZES))))
    with pytest.raises(ConfigError, match="Peeking cannot be trained on packed rows"):
        objective.attach(CPU)
    objective.close()


def test_the_preference_loss_by_hand() -> None:
    """Against -log sigmoid(beta * ((c - c_ref) - (r - r_ref))), from the model's own logits."""
    import peft

    torch.manual_seed(0)
    base, _ = tiny.make()
    network = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    network.eval()
    pairs: list[Unit] = [
        (document(np.random.default_rng(i), 7), document(np.random.default_rng(9 + i), 5 + i))
        for i in range(3)
    ]
    beta, losses = 0.3, []
    for chosen, rejected in pairs:
        policy = own_loss(network, rejected) - own_loss(network, chosen)
        with network.disable_adapter(), torch.no_grad():
            reference = own_loss(network, rejected) - own_loss(network, chosen)
        margin = float((beta * (policy - reference)).detach())
        losses.append(float(np.log1p(np.exp(-margin))))
    config = ModelConfig(source="tiny")
    model = Model(network=network, tokenizer=None, config=config, dtype=torch.float32)
    objective = Dpo(model, beta)
    objective.attach(CPU)
    try:
        result = objective(Row.of(pairs, CPU))
    finally:
        objective.close()
    assert float(result["loss"].detach()) == pytest.approx(sum(losses), rel=1e-5)
    wins = sum(loss < np.log(2) for loss in losses)
    assert int(result["accuracy"]) == wins
    assert objective.weigh(pairs) == 3
    assert result["loss"].requires_grad
