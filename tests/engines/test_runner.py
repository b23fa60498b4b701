"""A step's logits are the model's own, however its tokens are cut and mixed; or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Llama4TextConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from deployments.config import EngineConfig
from deployments.engines.linears import PackedLinear
from deployments.engines.runner import Runner
from deployments.engines.sequence import Call, Chunk, Copy, Sequence, Step
from models.contracts import GenerateRequest
from models.errors import ConfigError
from tests.tiny_models import CONFIGS, CONTEXT, VOCABULARY

SLOTS = 4
EXACT = EngineConfig(slots=SLOTS, dtype="float64")


@pytest.fixture(scope="module")
def runners(tiny: Callable[[str], Path]) -> Iterator[Callable[[str], Runner]]:
    made: dict[str, Runner] = {}

    def runner(kind: str) -> Runner:
        if kind not in made:
            made[kind] = Runner(tiny(kind), EXACT)
        return made[kind]

    yield runner
    for each in made.values():
        each.close()


@pytest.fixture(scope="module")
def own(tiny: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    made: dict[str, PreTrainedModel] = {}

    def model(kind: str) -> PreTrainedModel:
        if kind not in made:
            made[kind] = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float64)
        return made[kind].eval()

    return model


def sequence(tokens: list[int]) -> Sequence:
    request = GenerateRequest(id="r", model="m", prompt=tuple(tokens))
    call = Call(request=request, prompt=tuple(tokens), arrived=0.0, deadline=0.0)
    return Sequence(call=call, index=0, max_tokens=1, tokens=tokens)


def chunk(of: Sequence, slot: int, start: int, end: int) -> Chunk:
    tokens = tuple(of.tokens[start:end])
    return Chunk(sequence=of, slot=slot, start=start, tokens=tokens, samples=end % 2 == 0)


token_lists = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=CONTEXT)


@settings(max_examples=20)
@pytest.mark.parametrize("kind", CONFIGS)
@given(data=st.data())
def test_any_pieces_in_any_mixture(
    data: st.DataObject,
    kind: str,
    runners: Callable[[str], Runner],
    own: Callable[[str], PreTrainedModel],
) -> None:
    runner = runners(kind)
    sequences = [
        sequence(tokens)
        for tokens in data.draw(st.lists(token_lists, min_size=1, max_size=SLOTS - 1))
    ]
    with torch.inference_mode():
        expected = {s: own(kind)(torch.tensor([s.tokens])).logits[0] for s in sequences}
    slots = data.draw(st.permutations(range(SLOTS)))
    slot = dict(zip(sequences, slots, strict=False))
    free = slots[len(sequences)]
    while unfinished := [s for s in sequences if s.computed < len(s.tokens)]:
        chosen = data.draw(st.sets(st.sampled_from(unfinished), min_size=1))
        copies = []
        if data.draw(st.booleans()):  # one moves to the free slot
            mover = data.draw(st.sampled_from(unfinished))
            copies.append(Copy(source=slot[mover], target=free, length=mover.computed))
            slot[mover], free = free, slot[mover]
        chunks = []
        for each in unfinished:
            if each in chosen:
                end = data.draw(st.integers(each.computed + 1, len(each.tokens)))
                chunks.append(chunk(each, slot[each], each.computed, end))
        logits, order, _ = runner.run(Step(moves=tuple(copies), chunks=tuple(chunks)))
        assert {id(c) for c in order} == {id(c) for c in chunks if c.samples}
        assert logits.shape == (len(order), VOCABULARY)
        for c, row in zip(order, logits, strict=True):
            last = c.start + len(c.tokens) - 1
            assert torch.allclose(row, expected[c.sequence][last], rtol=0, atol=1e-9)
        for c in chunks:
            c.sequence.computed = c.start + len(c.tokens)


def test_float32_weights_are_packed_and_held_once(tiny: Callable[[str], Path]) -> None:
    runner = Runner(tiny("llama"), EngineConfig(slots=1))
    kinds = {type(module) for module in runner.model.modules()}
    assert PackedLinear in kinds
    assert torch.nn.Linear not in kinds
    runner.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("slots", [1, 2])
def test_every_precision_fits(tiny: Callable[[str], Path], dtype: str, slots: int) -> None:
    runner = Runner(tiny("llama"), EngineConfig(slots=slots, dtype=dtype))
    assert (runner.context, runner.vocab_size) == (CONTEXT, VOCABULARY)
    logits, *_ = runner.run(Step(chunks=(chunk(sequence([1, 2]), 0, 0, 2),)))
    assert logits.dtype == getattr(torch, dtype)
    runner.close()


# --- models that do not fit -----------------------------------------------------------------

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LONG_PHI3 = Phi3Config(
    **SMALL,
    original_max_position_embeddings=32,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "factor": 2.0,
    },
)


def write(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    if isinstance(config, T5Config):
        model = T5ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
        else:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(**SMALL), "gives other logits"),
        (BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_head=2, n_layer=1), "context"),
        (T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1), "no causal"),
        (Gemma2Config(**SMALL), "'softcap'"),
        (RecurrentGemmaConfig(**SMALL), "gives other logits"),
        (Llama4TextConfig(**SMALL, attention_chunk_size=16, num_local_experts=2), "at most 16"),
        (LONG_PHI3, "runs beside"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_a_model_that_does_not_fit_is_refused_in_one_sentence(
    config: PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    registered = set(AttentionInterface())
    with pytest.raises(ConfigError, match=reason) as caught:
        Runner(write(config, tmp_path), EngineConfig(slots=4))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300
    assert set(AttentionInterface()) == registered, "a refused model leaves nothing behind"


def test_bloom_with_a_context_is_refused_for_its_attention(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_head=2, n_layer=2)
    with pytest.raises(ConfigError, match="gives other logits"):
        Runner(write(config, tmp_path), EngineConfig(slots=4, context=64))


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (LONG_PHI3, 32),
        (Llama4TextConfig(**SMALL, attention_chunk_size=16, num_local_experts=2), 16),
        (MixtralConfig(**SMALL, num_local_experts=2), None),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_a_model_that_fits_within_a_context(
    config: PreTrainedConfig, context: int | None, tmp_path: Path
) -> None:
    runner = Runner(write(config, tmp_path), EngineConfig(slots=4, context=context))
    assert runner.context == (context or 64)
    runner.close()


def test_a_context_longer_than_the_model_was_trained_for(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"engine\.context is 129.*trained for 128"):
        Runner(tiny("llama"), EngineConfig(context=129))


@pytest.mark.parametrize("file", [None, "config.json", "pytorch_model.bin"])
def test_a_folder_without_a_model(
    file: str | None, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    if file is not None:
        config = (tiny("llama") / "config.json").read_text()
        (tmp_path / "config.json").write_text(config)
        (tmp_path / file).write_text(config)
    with pytest.raises(ConfigError, match="holds no causal language model") as caught:
        Runner(tmp_path, EngineConfig())
    assert "\n" not in caught.value.message
