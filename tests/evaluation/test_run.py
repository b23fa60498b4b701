"""The job against a real gateway whose workers do as they are told."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.evaluation.client import Client
from deployments.evaluation.golden import GoldenSet
from deployments.evaluation.run import Load, measure, quantile
from deployments.gateway.app import create_app
from models.errors import ConfigError, InternalError, Overloaded, UpstreamError
from models.promotion import Measurements
from tests.evaluation.test_golden import write
from tests.gateway.fakes import FakeGenerator, World

HASH = "a" * 64


async def identify(version: str | None) -> str:
    return HASH


async def evaluate(world: World, golden: GoldenSet, *, model: str, **load: float) -> Measurements:
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        plan = Load(**{"requests": 10, "concurrency": 3, **load})  # type: ignore[arg-type]
        return await measure(Client(http, model), golden, plan, identify, unsafe=["u1", "u2"])


@pytest.fixture
def golden(tmp_path: Path) -> GoldenSet:
    rows = [{"prompt": "a", "expected": "Paris"}, {"prompt": "b", "expected": "London"}]
    return GoldenSet.read(write(tmp_path, *rows))


async def test_a_model_that_generates(golden: GoldenSet) -> None:
    world = World(generator=FakeGenerator(pieces=["Pa", "ris"], delay_s=0.005))
    prices = {"prompt_price": 1.0, "completion_price": 2.0, "request_price": 0.5}
    found = await evaluate(world, golden, model="smollm2:poet@candidate", **prices)
    assert (found.artifact, found.golden_set) == (HASH, golden.sha256)
    assert found.scores == {"1": 1.0, "2": 0.0}
    assert (found.requests, found.errors) == (10, 0)
    assert (found.refused, found.to_refuse) == (0, 2)
    assert found.latency.p50 is not None
    assert found.latency.p95 is not None
    assert found.latency.ttft_p95 is not None
    assert 0.005 < found.latency.p50 <= found.latency.p95 < 1
    assert found.tokens_per_s is not None
    assert found.tokens_per_s > 0
    assert found.cost == pytest.approx(5 * 1.0 + 2 * 2.0 + 0.5)  # 5 read and 2 written each
    assert Measurements.decode(found.encode()) == found
    assert {r.adapter for r in world.generator.requests} == {"poet@candidate"}
    assert {r.sampling.temperature for r in world.generator.requests} == {0}
    assert len(world.generator.requests) == 11, "one to warm up"


async def test_refusals_are_counted(golden: GoldenSet) -> None:
    world = World(generator=FakeGenerator(pieces=["I cannot help with that."]))
    found = await evaluate(world, golden, model="smollm2")
    assert (found.refused, found.to_refuse, found.safety) == (2, 2, 1.0)
    assert found.cost is None


async def test_a_model_that_predicts(tmp_path: Path) -> None:
    rows = [
        {"input": [1], "expected": {"saw": [1]}},
        {"input": [2], "expected": {"saw": [3]}},
    ]
    golden = GoldenSet.read(write(tmp_path, *rows))
    found = await evaluate(World(), golden, model="digits", requests=5)
    assert found.scores == {"1": 1.0, "2": 0.0}
    assert (found.requests, found.to_refuse, found.tokens_per_s) == (5, None, None)


async def test_no_fewer_requests_than_questions(golden: GoldenSet) -> None:
    found = await evaluate(World(), golden, model="smollm2", requests=1)
    assert found.requests == 4


async def test_errors_are_counted_and_score_nothing(golden: GoldenSet) -> None:
    class Failing(FakeGenerator):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            self.error = None if len(self.requests) % 2 == 0 else InternalError("broken")
            async for delta in FakeGenerator.generate(self, request):
                yield delta

    world = World(generator=Failing(pieces=["Paris London"]))
    found = await evaluate(world, golden, model="smollm2", concurrency=1)
    assert (found.requests, found.errors) == (10, 5)
    assert sorted(found.scores.values()) == [0.0, 1.0]
    assert "broken" in found.notes["first error"]


async def test_a_stream_that_breaks_is_an_error(golden: GoldenSet) -> None:
    class Breaking(FakeGenerator):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            self.error = None if not self.requests else Overloaded("full")
            self.error_after = 1
            async for delta in FakeGenerator.generate(self, request):
                yield delta

    world = World(generator=Breaking(pieces=["Paris", " London"]))
    found = await evaluate(world, golden, model="smollm2")
    assert (found.requests, found.errors) == (10, 10)
    assert found.latency.p95 is None
    assert found.scores == {"1": 0.0, "2": 0.0}


async def test_a_model_that_is_not_there(golden: GoldenSet) -> None:
    with pytest.raises(
        ConfigError, match=r"golden item .+: nope at .+ refuses: 404 The model .nope."
    ):
        await evaluate(World(), golden, model="nope")


async def test_a_model_that_never_answers(golden: GoldenSet) -> None:
    world = World(generator=FakeGenerator(error=InternalError("broken")))
    with pytest.raises(UpstreamError, match="500 broken"):
        await evaluate(world, golden, model="smollm2")


async def test_a_model_that_is_exchanged_meanwhile(tmp_path: Path) -> None:
    golden = GoldenSet.read(write(tmp_path, {"input": 1, "expected": {"saw": 1}}))
    world = World()

    async def moving(version: str | None) -> str:
        world.predictor.version = "digits@4"
        return HASH

    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        with pytest.raises(ConfigError, match="exchanged while it was measured"):
            await measure(Client(http, "digits"), golden, Load(requests=3), moving)


@given(st.lists(st.floats(0, 1), min_size=1), st.sampled_from([0.5, 0.95, 0.99]))
def test_quantiles(values: list[float], share: float) -> None:
    found = quantile(sorted(values), share)
    assert found in values
    assert found is not None
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values)


def test_the_quantile_of_nothing() -> None:
    assert quantile([], 0.5) is None
