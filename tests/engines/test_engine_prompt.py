"""How likely the tokens of a prompt were, told with the answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deployments.config import EngineConfig
from models.contracts import Delta, Sampling
from tests.engines.clients import LONG, Start, Tiny, answer, greedy, idle, request, text
from tests.tiny_models import CONFIGS

LIKELY = greedy(3, logprobs=2, prompt_logprobs=True)


def expected(folder: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    """Of each token but the first, from the model's own forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)


def check(deltas: list[Delta], index: int, prompt: tuple[int, ...], wanted: torch.Tensor) -> None:
    [told] = [d.prompt for d in deltas if d.index == index and d.prompt is not None]
    assert [token.token_id for token in told] == list(prompt)
    assert (told[0].logprob, told[0].top) == (None, ())
    for token, row in zip(told[1:], wanted, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-9)
        assert [top.token_id for top in token.top] == row.topk(2).indices.tolist()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("stream", [False, True])
async def test_it_is_what_the_model_itself_says(
    kind: str, stream: bool, tiny: Tiny, start: Start
) -> None:
    """However the prompt is cut up, whatever else runs, and though all of it is known already."""
    engine = start(tiny(kind), EngineConfig(slots=4, step_tokens=16, threads=1, dtype="float64"))
    wanted = expected(tiny(kind), LONG)
    await answer(engine, request(LONG, greedy(2)))
    asked = request(LONG, LIKELY, n=2, stream=stream)
    deltas, others = await asyncio.gather(
        answer(engine, asked), answer(engine, request((9, 8, 7), greedy(20)))
    )
    for index in range(2):
        check(deltas, index, LONG, wanted)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.cached_tokens == 0
    assert text(others) == text(await answer(engine, request((9, 8, 7), greedy(20))))
    await idle(engine)


async def test_a_prompt_of_one_token(tiny: Tiny, start: Start) -> None:
    deltas = await answer(start(tiny("llama")), request((7,), LIKELY))
    [told] = [delta.prompt for delta in deltas if delta.prompt is not None]
    assert [(token.token_id, token.logprob) for token in told] == [(7, None)]


async def test_who_does_not_ask_is_not_told(tiny: Tiny, start: Start) -> None:
    engine = start(tiny("llama"))
    for sampling in (
        greedy(2),
        greedy(2, logprobs=1),
        Sampling(prompt_logprobs=True, max_tokens=2),
    ):
        deltas = await answer(engine, request(LONG, sampling))
        assert all(delta.prompt is None for delta in deltas)
