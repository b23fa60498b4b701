"""Whatever meets in the batch, each request gets what it would get alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from models.contracts import Delta, FinishReason, GenerateRequest, Priority, Sampling
from tests.engines.clients import idle
from tests.engines.reference import Reference, with_many_eos
from tests.tiny_models import CONFIGS, CONTEXT

SHARED = tuple(range(40, 75))
PROMPTS: list[tuple[int, ...]] = [
    (1,),
    (2, 3),
    SHARED[:16],
    SHARED[:17],
    SHARED,
    (*SHARED, 1, 2, 3),
    (*SHARED[:20], 9, 9, 9),
    tuple(i * 7 % 251 for i in range(70)),
    tuple(i * 7 % 251 for i in range(CONTEXT - 2)),
    (*SHARED, *(i * 5 % 251 for i in range(CONTEXT - 1 - len(SHARED)))),
]
"""Few, so that references are computed once; alike at their beginnings, up to the whole context."""
SEEDED = [
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.7, top_p=0.9, repetition_penalty=1.2),
    Sampling(seed=3, temperature=1.5, top_k=20, presence_penalty=0.5, logit_bias={7: 2.0}),
]
SIZES = [(1, 16), (2, 64), (4, 16), (5, 23)]


@dataclass(frozen=True)
class Arrival:
    request: GenerateRequest
    after_ms: int
    leaves_after: int | None
    """Deltas after which the client goes."""


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    prompt = draw(st.sampled_from(PROMPTS))
    base = draw(st.just(Sampling(temperature=0.0)) | st.sampled_from(SEEDED))
    room = CONTEXT - len(prompt)
    sampling = Sampling(
        temperature=base.temperature,
        seed=base.seed,
        top_p=base.top_p,
        top_k=base.top_k,
        repetition_penalty=base.repetition_penalty,
        presence_penalty=base.presence_penalty,
        logit_bias=base.logit_bias,
        max_tokens=draw(st.sampled_from([*range(1, min(room, 16) + 1), None])),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([(), (3, 50, 100), tuple(range(0, 256, 17))])),
        stop=draw(st.sampled_from([(), ("a",), ("b", "zq", "\ufffd")])),
        logprobs=draw(st.sampled_from([None, None, 2])),
    )
    request = GenerateRequest(
        id="r",
        model="tiny",
        prompt=prompt,
        sampling=sampling,
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        stream=draw(st.booleans()),
        tenant=draw(st.sampled_from(["ada", "ada", "bob"])),
        priority=draw(st.sampled_from(list(Priority))),
    )
    return Arrival(
        request,
        after_ms=draw(st.sampled_from([0, 0, 3, 10, 30])),
        leaves_after=draw(st.sampled_from([None, None, None, 0, 1, 5])),
    )


@pytest.fixture(scope="module")
def pairs(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, tuple[int, int]], tuple[Engine, Reference]]]:
    """Engine and reference by architecture and size; engines go on from test to test."""
    references: dict[str, Reference] = {}
    engines: dict[tuple[str, tuple[int, int]], Engine] = {}
    folders: dict[str, Path] = {}

    def pair(kind: str, size: tuple[int, int]) -> tuple[Engine, Reference]:
        if kind not in references:
            folders[kind] = with_many_eos(tiny(kind), tmp_path_factory.mktemp(f"{kind}-eos"))
            references[kind] = Reference(folders[kind])
        if (kind, size) not in engines:
            slots, step_tokens = size
            config = EngineConfig(slots=slots, step_tokens=step_tokens, dtype="float64", threads=1)
            engines[kind, size] = Engine("tiny", folders[kind], config, QueueConfig())
        return engines[kind, size], references[kind]

    yield pair
    for engine in engines.values():
        engine.close()


async def receive(engine: Engine, arrival: Arrival) -> list[Delta]:
    await asyncio.sleep(arrival.after_ms / 1000)
    deltas: list[Delta] = []
    if arrival.leaves_after == 0:  # in the midst of waiting
        task = asyncio.ensure_future(anext(engine.generate(arrival.request)))
        await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.wait([task])
        return deltas
    async with aclosing(engine.generate(arrival.request)) as stream:
        async for delta in stream:
            deltas.append(delta)
            if len(deltas) == arrival.leaves_after:
                break
    return deltas


def check(arrival: Arrival, deltas: list[Delta], reference: Reference) -> None:
    request = arrival.request
    generated = 0
    for choice in range(request.n):
        own = [d for d in deltas if d.index == choice]
        expected = reference.answer(request, choice)
        tokens = [t for d in own for t in d.token_ids]
        text = "".join(d.text for d in own)
        generated += len(tokens)
        assert tokens == expected.tokens[: len(tokens)]
        assert expected.text.startswith(text)
        if request.sampling.logprobs is not None:
            assert [p.token_id for d in own for p in d.logprobs or ()] == tokens
        if arrival.leaves_after is None:
            assert own[-1].finish_reason is expected.finish_reason
            assert (tokens, text) == (expected.tokens, expected.text)
        for delta in own[:-1]:
            assert delta.finish_reason is None
            assert request.stream, "one delta a choice"
    if arrival.leaves_after is None:
        usage = deltas[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(request.prompt), generated)
        assert 0 <= usage.cached_tokens < usage.prompt_tokens
        assert all(d.usage is None for d in deltas[:-1])


async def together(engine: Engine, crowd: list[Arrival]) -> list[list[Delta]]:
    answers = asyncio.gather(*(receive(engine, arrival) for arrival in crowd))
    while not answers.done():
        engine.check_integrity()
        await asyncio.sleep(0.005)
    got = await answers
    await idle(engine)  # cancellations may still be under way
    return got


class TestAnyMixture:
    examples = 6

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_answers_as_alone(
        self, kind: str, pairs: Callable[[str, tuple[int, int]], tuple[Engine, Reference]]
    ) -> None:
        @settings(max_examples=self.examples)
        @given(st.sampled_from(SIZES), st.lists(arrivals(), min_size=1, max_size=8))
        def property_(size: tuple[int, int], crowd: list[Arrival]) -> None:
            engine, reference = pairs(kind, size)
            for arrival, deltas in zip(crowd, asyncio.run(together(engine, crowd)), strict=True):
                check(arrival, deltas, reference)

        property_()


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestAnyMixtureAtLength(TestAnyMixture):
    examples = 400


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_prompt_with_every_other(
    kind: str, pairs: Callable[[str, tuple[int, int]], tuple[Engine, Reference]]
) -> None:
    """All prompts at once, greedy and to the end of the context or of the sequence."""
    engine, reference = pairs(kind, (4, 16))
    crowd = [
        Arrival(
            GenerateRequest(
                id=str(i),
                model="tiny",
                prompt=prompt,
                sampling=Sampling(temperature=0.0, ignore_eos=ignore_eos),
            ),
            after_ms=0,
            leaves_after=None,
        )
        for i, prompt in enumerate(PROMPTS)
        for ignore_eos in (False, True)
    ]
    reasons = set()
    for arrival, deltas in zip(crowd, asyncio.run(together(engine, crowd)), strict=True):
        check(arrival, deltas, reference)
        reasons.add(deltas[-1].finish_reason)
    assert reasons == set(FinishReason)
