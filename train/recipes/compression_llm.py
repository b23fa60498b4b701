"""Compression (system 3) of a language model: its matrices in int8, a scale for each row.

The model is the artifact of a fine-tuning run: a whole one, or an adapter, which is added to its
base first. What is lost is measured through the artifact: on documents that training holds out, how
probable they are to the model, and how often the likeliest next token stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from models.predictors import int8_lm
from train.recipe import Config, Gate, Metrics, Recipe, RunContext

if TYPE_CHECKING:
    from torch import Tensor

    from train.recipes.llm.encoding import Example


class CompressionLlm(Config):
    text: str = "builtin:pydoc"
    """To judge on, as ``data.train`` of ``llm``."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Judge on this share of it, by document: the one that ``llm`` with the same share held out."""
    tokens: int = Field(default=4096, ge=64)
    """About so many of them."""
    sequence_length: int = Field(default=512, ge=8)
    """Read together."""


def run(config: CompressionLlm, context: RunContext) -> Metrics:
    import torch

    from train.recipes.llm import data, model
    from train.recipes.llm.config import DataConfig, LlmConfig, TrainingConfig

    network, tokenizer = model.read(context.inputs["causal-lm"], torch.device("cpu"))
    reading = LlmConfig(
        training=TrainingConfig(sequence_length=config.sequence_length),
        data=DataConfig(
            train=config.text, held_out=config.held_out, evaluation_tokens=config.tokens
        ),
    )
    prepared = data.load(reading, tokenizer)
    prepared.record(context)
    held_out = [example for unit in prepared.held_out for example in unit]

    before = judge(network, held_out)
    whole = sum(4 * weight.numel() for weight in network.parameters())
    int8_lm.save(context.artifact, network, tokenizer)
    del network  # two of them in memory are enough
    smaller, _ = int8_lm.read(context.artifact)
    after = judge(smaller, held_out)
    same = sum(int((a == b).sum()) for a, b in zip(before.likeliest, after.likeliest, strict=True))
    size = (context.artifact / int8_lm.WEIGHTS).stat().st_size
    return {
        "perplexity_before": math.exp(before.loss),
        "perplexity": math.exp(after.loss),
        "perplexity_ratio": math.exp(after.loss - before.loss),
        "agreement": same / sum(map(len, before.likeliest)),
        "bytes": float(size),
        "size_ratio": whole / size,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    loss: float
    """Mean negative log likelihood of a token that is answered for."""
    likeliest: Sequence[Tensor]
    """By example, (tokens,)."""


def judge(network: Any, examples: Sequence[Example]) -> Judged:
    import torch
    from torch.nn.functional import cross_entropy

    from train.recipes.llm.encoding import IGNORE

    total, count = 0.0, 0
    likeliest: list[Tensor] = []
    network.eval()
    for example in examples:
        tokens = torch.from_numpy(example.tokens).long()
        targets = torch.from_numpy(example.targets).long()
        with torch.inference_mode():
            logits = network(input_ids=tokens[None], use_cache=False).logits[0]
        total += float(cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"))
        count += example.trained
        likeliest.append(logits.argmax(1))
    return Judged(loss=total / count, likeliest=likeliest)


KEPT = Gate(at_most=1.02, baseline="the model in float32: 1")

RECIPE = Recipe(
    name="compression_llm",
    summary="A language model in a quarter of the bytes: int8 weights, measured by perplexity",
    kind="int8-causal-lm",
    config=CompressionLlm,
    run=run,
    inputs=("causal-lm",),
    gates={
        "perplexity_ratio": KEPT,
        "agreement": Gate(at_least=0.9, baseline="the model in float32: 1"),
        "size_ratio": Gate(at_least=3.5, baseline="the float32 weights of its input: 1"),
    },
    smoke_gates={
        "perplexity_ratio": KEPT,
        "size_ratio": Gate(at_least=3.0, baseline="the float32 weights of its input: 1"),
    },
    smoke=CompressionLlm(tokens=1024, sequence_length=128),
    load=int8_lm.load,
    sample=[{"text": "The capital of France is Paris."}, {"text": "Paris is of France."}],
    data="by configuration; default: pydoc_data.topics of the Python standard library, PSF-2.0;"
    " to judge on, not to learn from",
)
