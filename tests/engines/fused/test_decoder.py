"""Fused layers are the model's own, part by part; models of another structure keep their own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    OlmoConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from deployments.config import EngineConfig
from deployments.engines.adapters import Adapter
from deployments.engines.fused import OtherStructure
from deployments.engines.fused.decoder import FusedDecoder
from deployments.engines.linears import TOLERANCE, PackedLinear
from deployments.engines.runner import INT8_TOLERANCE, Runner
from deployments.engines.sequence import Chunk, Step
from tests.engines.test_runner import chunk, sequence, write
from tests.tiny_models import CONTEXT, VOCABULARY, byte_tokenizer

Tiny = Callable[[str], Path]
CONFIGS = {dtype: EngineConfig(slots=4, dtype=dtype) for dtype in ("int8", "float32")}
KINDS = [(kind, dtype) for kind in ("llama", "qwen2", "mistral", "gpt2") for dtype in CONFIGS]
NEAR = {"int8": 0.02, "float32": 1e-5}
"""In int8, a number or two between two of eight bits."""


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
OF_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
}
SCALED_BEYOND_64 = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "llama_4_scaling_beta": 4.0,
    "original_max_position_embeddings": 64,
}
"""Queries that grow with their positions, none of which a short prompt has."""


def readable(config: PreTrainedConfig, folder: Path) -> Path:
    """A random model with a tokenizer, so that there is text to judge int8 by."""
    write(config, folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runners(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Runner]]:
    folders = {kind: tiny(kind) for kind in ("llama", "qwen2", "gpt2")}
    # Its layers have their window from the configuration alone, longer than what load looks at.
    config = MistralConfig(**SMALL, sliding_window=16)
    folders["mistral"] = readable(config, tmp_path_factory.mktemp("mistral"))
    made = {(kind, dtype): Runner(folders[kind], CONFIGS[dtype]) for kind, dtype in KINDS}
    yield made
    for each in made.values():
        each.close()


def fused(runner: Runner) -> FusedDecoder:
    assert runner._fused is not None
    return runner._fused


@settings(max_examples=20)
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=12
    ),  # which sequence goes on, by how many tokens
    together=st.integers(1, 3),
)
def test_each_part_is_the_models_own_in_any_mixture(
    kind: str,
    dtype: str,
    pieces: list[tuple[int, int]],
    together: int,
    runners: dict[tuple[str, str], Runner],
) -> None:
    runner = runners[kind, dtype]
    sequences = [sequence([(n * k) % VOCABULARY for k in range(CONTEXT)]) for n in (3, 7, 11)]
    while pieces:
        step, pieces = dict(pieces[:together]), pieces[together:]
        chunks = []
        for number, count in step.items():
            each = sequences[number]
            end = min(each.computed + count, CONTEXT)
            if end > each.computed:
                chunks.append(chunk(each, number, each.computed, end))
                each.computed = end
        if not chunks:
            continue
        with fused(runner).compared() as differences, using_modules(runner):
            runner.run(Step(chunks=tuple(chunks)))
        assert all(each <= NEAR[dtype] for each in differences)


@contextmanager
def using_modules(runner: Runner) -> Iterator[None]:
    """In the block the model computes by its own modules."""
    kept, runner._fused = runner._fused, None
    try:
        yield
    finally:
        runner._fused = kept


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_passs_logits_are_those_of_the_modules(
    kind: str, dtype: str, runners: dict[tuple[str, str], Runner]
) -> None:
    runner = runners[kind, dtype]
    tokens = [(5 * k) % VOCABULARY for k in range(30)]
    step = Step(chunks=(chunk(sequence(tokens), 1, 0, 30),))
    found = runner.run(step).logits
    with using_modules(runner):
        own = runner.run(step).logits
    assert found.shape == own.shape
    assert torch.corrcoef(torch.stack([found[0], own[0]]))[0, 1] > 0.99
    if dtype == "float32":
        assert torch.allclose(found, own, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("dtype", CONFIGS)
def test_a_row_that_is_not_finite_spoils_no_other(
    dtype: str, runners: dict[tuple[str, str], Runner]
) -> None:
    runner = runners["llama", dtype]
    steps = [chunk(sequence([1, 2, 3, 4, 5, 6]), slot, 0, 6) for slot in (0, 1)]
    alone = runner.run(Step(chunks=(steps[1],))).logits
    layer = fused(runner)._layers[0]
    with torch.inference_mode():
        embedding = runner.model.get_input_embeddings().weight
        kept = embedding[1].clone()
        embedding[1] = float("nan")
        try:
            other = chunk(sequence([9, 2, 3, 4, 5, 6]), 2, 0, 6)
            beside = runner.run(Step(chunks=(steps[0], other))).logits
            expected = runner.run(Step(chunks=(other,))).logits
        finally:
            embedding[1] = kept
    assert torch.isnan(beside[0]).all()
    assert torch.isfinite(beside[1]).all()
    assert torch.allclose(beside[1], expected[0], atol=0.1 * float(expected.abs().max()))
    assert torch.isfinite(alone).all()
    assert np.isfinite(layer.attention_norm.gain).all()
    for slot in (0, 1, 2):  # what is left of it in the cache
        runner.wipe(slot, 6)


def adapter(runner: Runner, layers: Sequence[str], rank: int) -> Adapter:
    """A random one of the layers with these last names."""
    weights = {
        name: (torch.randn(rank, target.inputs) / 4, torch.randn(rank, target.outputs) / 4)
        for name, target in runner._targets.items()
        if name.rpartition(".")[2] in layers
    }
    assert weights
    return Adapter(name=f"r{rank}", rank=rank, bytes=0, weights=weights)


def adapted(tokens: list[int], by: Adapter | None, slot: int, start: int = 0) -> Chunk:
    made = dataclasses.replace(chunk(sequence(tokens), slot, start, len(tokens)), samples=True)
    made.sequence.call = dataclasses.replace(made.sequence.call, adapter=by)
    return made


EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = {
    "llama": [("q_proj", "v_proj"), ("up_proj",), EVERY],
    "qwen2": [("q_proj", "v_proj"), EVERY],
    "gpt2": [("c_attn",), ("c_attn", "c_proj", "c_fc")],
}


@pytest.mark.parametrize("dtype", CONFIGS)
@pytest.mark.parametrize(
    ("kind", "layers"), [(kind, each) for kind in SOME for each in SOME[kind]], ids=str
)
def test_adapters_add_what_they_add_to_the_models_own_layers(
    kind: str, layers: Sequence[str], dtype: str, runners: dict[tuple[str, str], Runner]
) -> None:
    runner = runners[kind, dtype]
    one, other = adapter(runner, layers, 4), adapter(runner, layers, 11)
    tokens = [(7 * k) % VOCABULARY for k in range(20)]
    first = Step(chunks=(adapted(tokens[:-1], one, 0), adapted(tokens[:-1], None, 1)))
    then = Step(
        chunks=(
            adapted(tokens, one, 0, start=19),
            adapted(tokens, None, 1, start=19),
            adapted(tokens[:9], other, 2),
            adapted(tokens[:5], one, 3),
        )
    )
    found = [runner.run(step).logits for step in (first, then)]
    with using_modules(runner):
        own = [runner.run(step).logits for step in (first, then)]
    for ours, theirs in zip(found, own, strict=True):
        # In int8 a number between two of eight bits makes a difference that later layers enlarge.
        near = {"float32": 1e-5, "int8": 0.1}[dtype]
        assert torch.allclose(ours, theirs, atol=near * float(theirs.abs().max()))
    assert not torch.allclose(own[1][0], own[1][1], atol=0.1 * float(own[1].abs().max()))


@pytest.mark.parametrize("dtype", CONFIGS)
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (GraniteConfig(**SMALL, residual_multiplier=0.5), "which differ"),
        (GraniteConfig(**SMALL, embedding_multiplier=3.0), "which differ"),
        (GraniteConfig(**SMALL, logits_scaling=4.0), "which differ"),
        (LlamaConfig(**SMALL, hidden_act="gelu"), "gates are not SiLU's"),
        (GPT2Config(**OF_GPT2, activation_function="gelu"), "not GELU by tanh"),
        (GPT2Config(**OF_GPT2, add_cross_attention=True), "crossattention"),
        (Ministral3Config(**SMALL, head_dim=8, rope_parameters=SCALED_BEYOND_64), "which differ"),
        (Qwen3Config(**SMALL, head_dim=8), "q_norm"),
        (OlmoConfig(**SMALL), "has no attribute 'variance_epsilon'"),
    ],
    ids=[
        "residual",
        "embedding",
        "logits",
        "gelu",
        "gpt2 gelu",
        "gpt2 cross",
        "ministral3",
        "qwen3",
        "olmo",
    ],
)
def test_a_model_of_another_structure_is_computed_by_its_own_modules(
    config: PreTrainedConfig,
    why: str,
    dtype: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    runner = Runner(readable(config, tmp_path), CONFIGS[dtype])
    assert runner._fused is None
    assert "is computed by its own modules" in caplog.text
    assert why in caplog.text
    runner.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0.5},
        {"gain": np.full(32, 0.5, np.float32)},
        {"shift": np.full(32, 0.5, np.float32)},
        {"centred": True},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", INT8_TOLERANCE), ("float32", TOLERANCE)])
def test_a_part_that_is_not_the_models_own_is_seen(
    wrong: dict[str, object],
    dtype: str,
    tolerance: float,
    runners: dict[tuple[str, str], Runner],
) -> None:
    runner = runners["llama", dtype]
    own = fused(runner)._layers[1]
    norm = dataclasses.replace(own.mlp_norm, **wrong)  # type: ignore[arg-type]
    fused(runner)._layers[1] = dataclasses.replace(own, mlp_norm=norm)
    try:
        with fused(runner).compared() as differences, using_modules(runner):
            runner.run(Step(chunks=(chunk(sequence(list(range(20))), 0, 0, 20),)))
    finally:
        fused(runner)._layers[1] = own
    assert max(differences) > tolerance


@pytest.mark.parametrize(
    ("fails", "level"),
    [(OtherStructure("another"), logging.INFO), (RuntimeError("of sizes"), logging.WARNING)],
)
def test_what_fails_while_it_is_tried_keeps_no_model_from_answering(
    fails: Exception,
    level: int,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object) -> None:
        raise fails

    monkeypatch.setattr(FusedDecoder, "_layer", broken)
    caplog.set_level(logging.INFO)
    runner = Runner(tiny("llama"), CONFIGS["float32"])
    assert runner._fused is None
    [told] = [each for each in caplog.records if "its own modules" in each.message]
    assert (told.levelno, str(fails) in told.message) == (level, True)
    assert runner.run(Step(chunks=(chunk(sequence([1, 2, 3]), 0, 0, 3),))).logits.isfinite().all()
    runner.close()


def test_layers_of_several_sizes_share_no_room(runners: dict[tuple[str, str], Runner]) -> None:
    runner = runners["llama", "float32"]
    model = runner.model.get_decoder()
    kept = model.layers[1].mlp.down_proj
    model.layers[1].mlp.down_proj = PackedLinear(nn.Linear(48, 32))
    try:
        with pytest.raises(OtherStructure, match="several sizes"):
            FusedDecoder(runner.model, runner.cache, runner._attention)
    finally:
        model.layers[1].mlp.down_proj = kept


@pytest.mark.parametrize("wrong", [{"scaling": 0.1}, {"window": 4}])
def test_attention_that_is_asked_for_something_else_is_seen(
    wrong: dict[str, object], runners: dict[tuple[str, str], Runner]
) -> None:
    runner = runners["llama", "float32"]
    own = fused(runner)._layers[1]
    fused(runner)._layers[1] = dataclasses.replace(own, **wrong)  # type: ignore[arg-type]
    try:
        with (
            pytest.raises(OtherStructure, match="something else"),
            fused(runner).compared(),
            using_modules(runner),
        ):
            runner.run(Step(chunks=(chunk(sequence([1, 2, 3]), 0, 0, 3),)))
    finally:
        fused(runner)._layers[1] = own
