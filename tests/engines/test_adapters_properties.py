"""Whatever adapters, arrivals, departures and evictions meet: each request gets PEFT's answer."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import AdapterLimits, EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from models.contracts import Delta
from models.errors import NotFound, Overloaded
from tests.engines.adapters import Wardrobe
from tests.engines.clients import idle
from tests.engines.reference import with_many_eos
from tests.engines.test_engine_properties import Arrival, arrivals, check, receive
from tests.tiny_models import CONFIGS, CONTEXT

PROMPTS = [tuple(i * 7 % 251 for i in range(CONTEXT - n)) for n in (2, 30, 31)]
"""Alike at their beginning, and with room for few tokens: PEFT's answers take most of the time."""
SIZES = [(2, 64), (5, 23)]


@dataclass(frozen=True)
class Meddling:
    """What an operator does meanwhile."""

    after_ms: int
    name: str
    unload: bool


@st.composite
def guests(draw: st.DrawFn) -> Arrival:
    """Arrivals with an adapter; of prompts that leave room for few tokens."""
    arrival = draw(arrivals())
    prompt = draw(st.sampled_from(PROMPTS))
    room = CONTEXT - len(prompt)
    most = arrival.request.sampling.max_tokens
    sampling = replace(arrival.request.sampling, max_tokens=most and min(most, room))
    adapter = draw(st.sampled_from([None, "narrow", "wide", "odd", "deep"]))
    asked = replace(arrival.request, prompt=prompt, sampling=sampling, adapter=adapter)
    return replace(arrival, request=asked)


meddlings = st.builds(
    Meddling,
    after_ms=st.sampled_from([0, 2, 5, 20]),
    name=st.sampled_from(["narrow", "wide", "odd"]),
    unload=st.booleans(),
)


class House:
    """Engines of one architecture, with room for some of the adapters; they go on from test to
    test.
    """

    def __init__(self, clothes: Wardrobe) -> None:
        self.clothes = clothes
        self._engines: dict[tuple[int, int], Engine] = {}
        self.refused: Counter[bool] = Counter()

    def engine(self, size: tuple[int, int]) -> Engine:
        if size not in self._engines:
            slots, step_tokens = size
            room = sum(path.stat().st_size for path in self._weights("deep", "narrow"))
            config = EngineConfig(
                slots=slots,
                step_tokens=step_tokens,
                dtype="float64",
                threads=1,
                # files are float32
                adapters=AdapterLimits(memory_mb=2 * room / 2**20),
            )
            self._engines[size] = Engine(
                "tiny",
                self.clothes.base,
                config,
                QueueConfig(),
                resolve=self.clothes.folders.__getitem__,
            )
        return self._engines[size]

    def _weights(self, *names: str) -> Iterator[Path]:
        return (self.clothes.folders[name] / "adapter_model.safetensors" for name in names)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


@pytest.fixture(scope="module")
def houses(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], House]]:
    made: dict[str, House] = {}

    def house(kind: str) -> House:
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-house")
            base = with_many_eos(tiny(kind), folder / "base")
            made[kind] = House(Wardrobe(base, folder, kind))
        return made[kind]

    yield house
    for house_ in made.values():
        house_.close()


async def visit(engine: Engine, arrival: Arrival) -> list[Delta] | None:
    try:
        return await receive(engine, arrival)
    except Overloaded:  # every adapter in memory is in use
        assert arrival.request.adapter is not None
        return None


async def meddle(engine: Engine, what: Meddling, folder: Path) -> None:
    await asyncio.sleep(what.after_ms / 1000)
    try:
        if what.unload:
            engine.unload_adapter(what.name)
        else:
            await asyncio.to_thread(engine.load_adapter, what.name, folder)
    except (NotFound, Overloaded):
        pass


async def together(
    house: House, engine: Engine, crowd: list[Arrival], operator: list[Meddling]
) -> list[list[Delta] | None]:
    visits = asyncio.gather(*(visit(engine, arrival) for arrival in crowd))
    work = asyncio.gather(*(meddle(engine, w, house.clothes.folders[w.name]) for w in operator))
    while not (visits.done() and work.done()):
        engine.check_integrity()
        await asyncio.sleep(0.005)
    got = await visits
    await idle(engine)
    return got


def answers_as_peft(house: House, examples: int) -> None:
    @settings(max_examples=examples)
    @given(
        st.sampled_from(SIZES),
        st.lists(guests(), min_size=1, max_size=8),
        st.lists(meddlings, max_size=3),
    )
    def property_(size: tuple[int, int], crowd: list[Arrival], operator: list[Meddling]) -> None:
        engine = house.engine(size)
        answers = asyncio.run(together(house, engine, crowd, operator))
        for arrival, deltas in zip(crowd, answers, strict=True):
            house.refused[deltas is None] += 1
            if deltas is not None:
                check(arrival, deltas, house.clothes.reference(arrival.request.adapter))
        assert all(info.in_use == 0 for info in engine.adapters())

    property_()
    assert house.refused[False] > house.refused[True], "most are served"


def test_any_mixture_answers_as_peft(houses: Callable[[str], House]) -> None:
    answers_as_peft(houses("llama"), examples=8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", CONFIGS)
def test_any_mixture_at_length(kind: str, houses: Callable[[str], House]) -> None:
    answers_as_peft(houses(kind), examples=300)


def test_there_is_room_for_some_but_not_for_all(houses: Callable[[str], House]) -> None:
    engine = houses("llama").engine(SIZES[0])
    folders = houses("llama").clothes.folders
    for name, folder in itertools.islice(folders.items(), 3):
        engine.load_adapter(name, folder)
    assert all(info.resident for info in engine.adapters())
    engine.load_adapter("deep", folders["deep"])
    assert not all(info.resident for info in engine.adapters())
