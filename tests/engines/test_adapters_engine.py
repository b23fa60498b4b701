"""Adapters in a running engine: they answer as in PEFT, and are nobody else's business."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.config import AdapterLimits, EngineConfig
from deployments.engines.engine import Engine
from deployments.observability.events import AdapterEvicted, AdaptersResident, Event
from models.errors import InternalError, InvalidInput, NotFound, Overloaded, Timeout
from tests.engines.adapters import Wardrobe
from tests.engines.clients import (
    LONG,
    Start,
    Tiny,
    answer,
    greedy,
    idle,
    kinds,
    request,
    stream,
    tokens,
    until,
)
from tests.engines.gate import Gate
from tests.engines.reference import with_many_eos
from tests.tiny_models import CONFIGS

ROOMY = EngineConfig(slots=16, step_tokens=24, dtype="float64", threads=1)


@pytest.fixture(scope="module")
def wardrobe(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Wardrobe]:
    """By architecture; made once."""
    made: dict[str, Wardrobe] = {}

    def of(kind: str) -> Wardrobe:
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-adapters")
            made[kind] = Wardrobe(with_many_eos(tiny(kind), folder / "base"), folder, kind)
        return made[kind]

    return of


def load_all(engine: Engine, wardrobe: Wardrobe) -> None:
    for name, folder in wardrobe.folders.items():
        engine.load_adapter(name, folder)


@pytest.mark.parametrize("kind", CONFIGS)
async def test_different_adapters_in_one_batch_answer_as_in_peft(
    kind: str, wardrobe: Callable[[str], Wardrobe], start: Start
) -> None:
    clothes = wardrobe(kind)
    engine = start(clothes.base, ROOMY)
    load_all(engine, clothes)
    prompts: list[tuple[int, ...]] = [(7,), LONG[:20], LONG]
    asked = [
        request(prompt, greedy(12, ignore_eos=False), adapter=adapter)
        for prompt, adapter in itertools.product(prompts, [None, *clothes.folders])
    ]
    answers = await asyncio.gather(*(answer(engine, what) for what in asked))
    for what, deltas in zip(asked, answers, strict=True):
        reference = clothes.reference(what.adapter)
        assert tokens(deltas) == reference.generate(what.prompt, 12)
    by_adapter = {tuple(tokens(deltas)) for deltas in answers[-5:]}
    assert len(by_adapter) == 5, "the adapters are all different"
    assert all(info.in_use == 0 for info in engine.adapters())


async def test_keys_and_values_are_shared_within_one_version_of_one_adapter(
    wardrobe: Callable[[str], Wardrobe], start: Start
) -> None:
    clothes = wardrobe("llama")
    engine = start(clothes.base, ROOMY.model_copy(update={"step_tokens": 64}))
    load_all(engine, clothes)
    gate = Gate(engine)
    first = [
        asyncio.create_task(answer(engine, request(LONG, adapter=adapter)))
        for adapter in (None, "wide")
    ]
    await gate.entered()
    await gate.steps(2)
    engine.load_adapter("wide", clothes.folders["deep"])
    shared = asyncio.create_task(answer(engine, request(LONG, greedy(9))))
    others = {
        adapter: asyncio.create_task(answer(engine, request(LONG, greedy(9), adapter=adapter)))
        for adapter in ("wide", "odd")
    }
    await until(lambda: len(engine._scheduler.queue) == 3)
    gate.open()
    assert (await shared)[-1].usage.cached_tokens == len(LONG) - 1  # type: ignore[union-attr]
    for adapter, task in others.items():
        deltas = await task
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.cached_tokens == 0
        worn = "deep" if adapter == "wide" else adapter
        expected = clothes.reference(worn).answer(request(LONG, greedy(9))).tokens
        assert tokens(deltas) == expected
    old = clothes.reference("wide").answer(request(LONG)).tokens
    assert tokens(await first[1]) == old, "what began with a version ends with it"


async def test_choices_of_one_request_share_its_adapters_prompt(
    wardrobe: Callable[[str], Wardrobe], start: Start
) -> None:
    clothes = wardrobe("llama")
    engine = start(clothes.base, ROOMY)
    load_all(engine, clothes)
    what = request(LONG, greedy(8), adapter="wide", n=3)
    deltas = await answer(engine, what)
    expected = clothes.reference("wide").answer(what).tokens
    assert [tokens(deltas, i) for i in range(3)] == [expected] * 3


async def test_loading_never_waits_for_a_step_nor_a_step_for_loading(
    wardrobe: Callable[[str], Wardrobe], start: Start
) -> None:
    clothes = wardrobe("llama")
    held = threading.Event()

    def resolve(name: str) -> Path:
        assert held.wait(30)
        return clothes.folders[name]

    engine = start(clothes.base, ROOMY, resolve=resolve)
    gate = Gate(engine)
    running = asyncio.create_task(answer(engine, request(LONG, greedy(9))))
    await gate.entered()
    await asyncio.to_thread(engine.load_adapter, "narrow", clothes.folders["narrow"])
    gate.open()
    waiting = asyncio.create_task(answer(engine, request(LONG, greedy(9), adapter="wide")))
    assert len(tokens(await running)) == 9
    assert not waiting.done()
    held.set()
    expected = clothes.reference("wide").answer(request(LONG, greedy(9))).tokens
    assert tokens(await waiting) == expected


async def test_what_goes_wrong_with_an_adapter_is_told_to_its_requests_alone(
    wardrobe: Callable[[str], Wardrobe], start: Start, tmp_path: Path
) -> None:
    clothes = wardrobe("llama")
    broken = tmp_path / "broken"
    shutil.copytree(clothes.folders["wide"], broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    def resolve(name: str) -> Path:
        if name == "broken":
            return broken
        if name == "down":
            raise OSError("the registry does not answer")
        raise NotFound(f"No adapter {name}.")

    engine = start(clothes.base, ROOMY, resolve=resolve)
    engine.load_adapter("wide", clothes.folders["wide"])
    names = ("wide", "broken", "down", "nobody")
    answers = await asyncio.gather(
        *(answer(engine, request(LONG, greedy(9), adapter=name)) for name in names),
        return_exceptions=True,
    )
    good, bad, down, nobody = answers
    assert not isinstance(good, BaseException)
    assert tokens(good) == clothes.reference("wide").answer(request(LONG, greedy(9))).tokens
    assert isinstance(bad, InvalidInput)
    assert isinstance(down, InternalError)
    assert isinstance(nobody, NotFound)
    await idle(engine)


async def test_names_that_nobody_knows(wardrobe: Callable[[str], Wardrobe], start: Start) -> None:
    clothes = wardrobe("llama")
    engine = start(clothes.base)
    with pytest.raises(NotFound, match="tiny has no adapter 'wide'; it has: none"):
        await answer(engine, request(adapter="wide"))
    load_all(engine, clothes)
    with pytest.raises(NotFound, match="it has: deep, narrow, odd, wide"):
        await answer(engine, request(adapter="tall"))
    engine.unload_adapter("wide")
    with pytest.raises(NotFound):
        await answer(engine, request(adapter="wide"))
    assert [info.name for info in engine.adapters()] == ["deep", "narrow", "odd"]


async def test_an_adapter_of_another_architecture(
    wardrobe: Callable[[str], Wardrobe], start: Start
) -> None:
    engine = start(wardrobe("gpt2").base)
    with pytest.raises(InvalidInput, match="the layers c_attn, c_fc, c_proj"):
        engine.load_adapter("wide", wardrobe("llama").folders["wide"])
    engine = start(wardrobe("qwen2").base)
    with pytest.raises(InvalidInput, match="made for another one"):
        engine.load_adapter("wide", wardrobe("llama").folders["wide"])


async def test_memory_is_bounded_and_who_runs_is_safe(
    wardrobe: Callable[[str], Wardrobe], start: Start
) -> None:
    clothes = wardrobe("llama")
    probe = start(clothes.base)
    load_all(probe, clothes)
    sizes = {info.name: info.bytes for info in probe.adapters()}
    limit = AdapterLimits(memory_mb=(sizes["wide"] + sizes["odd"]) / 2**20)
    events: list[Event] = []
    engine = start(
        clothes.base,
        ROOMY.model_copy(update={"adapters": limit}),
        resolve=lambda name: clothes.folders[name],
        emit=events.append,
    )
    gate = Gate(engine)
    wide = asyncio.create_task(answer(engine, request(LONG, greedy(9), adapter="wide")))
    await gate.entered()
    odd = asyncio.create_task(answer(engine, request(LONG, greedy(9), adapter="odd")))
    await until(lambda: len(engine._scheduler.queue) == 1)
    with pytest.raises(Overloaded, match="narrow"):
        await answer(engine, request(adapter="narrow"))
    gate.open()
    for name, task in (("wide", wide), ("odd", odd)):
        expected = clothes.reference(name).answer(request(LONG, greedy(9))).tokens
        assert tokens(await task) == expected
    for name in ("narrow", "wide", "odd", "wide"):
        deltas = await answer(engine, request(LONG, greedy(9), adapter=name))
        expected = clothes.reference(name).answer(request(LONG, greedy(9))).tokens
        assert tokens(deltas) == expected
    assert len(kinds(events, AdapterEvicted)) >= 2
    most = max(event.bytes for event in kinds(events, AdaptersResident))
    assert most <= sizes["wide"] + sizes["odd"]


async def test_who_leaves_while_an_adapter_is_loaded_or_runs_lets_it_go(
    wardrobe: Callable[[str], Wardrobe], start: Start
) -> None:
    clothes = wardrobe("llama")
    held = threading.Event()

    def resolve(name: str) -> Path:
        assert held.wait(30)
        return clothes.folders[name]

    engine = start(clothes.base, ROOMY, resolve=resolve)
    leaving = asyncio.create_task(answer(engine, request(adapter="wide")))
    with pytest.raises(Timeout) as late:
        await answer(engine, request(adapter="wide", timeout_s=0.01))
    assert late.value.details == {"phase": "adapter"}
    leaving.cancel()
    await asyncio.wait([leaving])
    held.set()
    await until(lambda: bool(engine.adapters()))
    assert engine.adapters()[0].in_use == 0
    running = stream(engine, request(LONG, greedy(60), adapter="wide", stream=True))
    await anext(running)
    assert engine.adapters()[0].in_use == 1
    await running.aclose()
    assert engine.adapters()[0].in_use == 0
    await idle(engine)


async def test_a_request_that_cannot_work_loads_nothing(
    wardrobe: Callable[[str], Wardrobe], start: Start
) -> None:
    asked: list[str] = []

    def resolve(name: str) -> Path:
        asked.append(name)
        raise NotFound(name)

    engine = start(wardrobe("llama").base, ROOMY, resolve=resolve)
    with pytest.raises(InvalidInput):
        await answer(engine, request((), adapter="wide"))
    assert asked == []
