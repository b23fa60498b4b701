"""The order of the policies: the documented one, and where another would be a hole."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.caching.cache import ResponseCache
from deployments.config import Cors, GatewayConfig, PathsConfig
from deployments.gateway import app as composition
from deployments.gateway.app import Policy, create_app, policies, routes
from deployments.gateway.services import Services
from deployments.launcher.background import REPOSITORY
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.principal import Role
from state.cache import Bounds, Lenient
from state.cache.memory import MemoryCache
from state.database import Database
from state.places import sqlite_url
from tests.gateway.asgi import BASE, RawCall
from tests.gateway.fakes import World
from tests.gateway.test_authentication import Secured, secured
from tests.gateway.test_infer import PATH as INFER
from tests.gateway.test_infer import asking

__all__ = ["secured"]

ORDER = {
    "RequestId": "request id",
    "SecurityHeaders": "security headers",
    "CORSMiddleware": "origins",
    "Access": "access event",
    "QuotaHeaders": "quota headers",
    "Deprecations": "deprecations",
    "Failures": "failures → error bodies",
    "PathFilter": "odd paths",
    "Authentication": "keys",
    "Loopback": "this machine only if there are none",
    "CacheControl": "cache control",
    "Compression": "compression",
    "Disconnect": "disconnect",
    "SlowReader": "slow readers",
    "Deadline": "deadline",
    "BodyLimit": "body limit",
    "SlowBody": "slow bodies",
    "Idempotency": "idempotency",
}
"""From the outermost inwards, and what docs/architecture.md calls each."""

ORIGIN = "https://a.example"
CONFIG = GatewayConfig(
    max_body_bytes=1024,
    cors=Cors(allow_origins=(ORIGIN,)),
    deprecations={"routes": {"/v1/completions": {"since": "2026-11-01"}}},  # type: ignore[arg-type]
)


def name_of(policy: Policy) -> str:
    made = policy.func if isinstance(policy, partial) else policy
    return str(made.__name__)  # type: ignore[union-attr]


def everything(world: World) -> Services:
    world.config = CONFIG
    world.cache = ResponseCache(
        store=Lenient(MemoryCache(Bounds(max_bytes=10, max_entry_bytes=10))),
        ttl_s=1,
        emit=world.recorder,
    )
    unused = IdempotencyRecords(None, ttl_s=1)  # type: ignore[arg-type]
    return replace(world.services(), idempotency=unused)


def names(services: Services) -> list[str]:
    return [name_of(policy) for policy in policies(services, routes(services))]


def test_the_list_is_the_documented_order(world: World, secured: Secured) -> None:
    services = everything(world)
    without_keys = replace(services, authenticator=None)
    assert names(without_keys) == list(ORDER)
    assert names(services) == [name for name in ORDER if name != "Loopback"]
    documented = (REPOSITORY / "docs/architecture.md").read_text()
    [listed] = re.findall(r"from the outside in:(.*?)\. Their", documented, re.DOTALL)
    assert " ".join(listed.split()).split(", ") == list(ORDER.values())


def swapped(outer: str, inner: str) -> Any:
    """The same list with two that have changed places."""

    def other(services: Services, operations: Sequence[Any]) -> Sequence[Policy]:
        listed = list(policies(services, operations))
        at = {name_of(policy): place for place, policy in enumerate(listed)}
        listed[at[outer]], listed[at[inner]] = listed[at[inner]], listed[at[outer]]
        return listed

    return other


@pytest.fixture
async def records(tmp_path: Path) -> AsyncIterator[IdempotencyRecords]:
    async with await Database.open(sqlite_url(tmp_path / "idempotency.db")) as database:
        yield IdempotencyRecords(database, ttl_s=60)


class Stack:
    """A gateway with everything on, in the order that it has and in others."""

    def __init__(self, secured: Secured, records: IdempotencyRecords) -> None:
        self.secured, self.world = secured, secured.world
        self.world.config = CONFIG
        self.services = replace(self.world.services(), idempotency=records)
        self.key = {"authorization": f"Bearer {secured.keys[Role.DEVELOPER]}"}

    @asynccontextmanager
    async def client(self, *swap: str) -> AsyncIterator[httpx.AsyncClient]:
        with pytest.MonkeyPatch.context() as patch:
            if swap:
                patch.setattr(composition, "policies", swapped(*swap))
            transport = httpx.ASGITransport(create_app(self.services), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            yield client


@pytest.fixture
def stack(secured: Secured, records: IdempotencyRecords) -> Stack:
    return Stack(secured, records)


async def test_an_odd_path_is_refused_before_anybody_is_asked_for_a_key(stack: Stack) -> None:
    """What two readers read differently is looked up nowhere."""
    swap = ("PathFilter", "Authentication")
    for order, expected in (((), 400), (swap, 401)):
        async with stack.client(*order) as client:
            answer = await client.get("/v1/models/a%2f..%2fb")
            assert answer.status_code == expected


async def test_what_is_denied_is_not_there_for_who_has_no_key_either(stack: Stack) -> None:
    paths = PathsConfig(deny=("/admin",))
    config = CONFIG.model_copy(update={"paths": paths})
    stack.services = replace(stack.services, config=config)
    async with stack.client() as client:
        assert (await client.get("/admin/v1/tenants")).status_code == 404


async def test_without_a_key_nothing_of_a_body_is_read(stack: Stack) -> None:
    headers = {"content-type": "application/json", "content-length": "9999"}
    for order, expected in (((), 401), (("Authentication", "BodyLimit"), 413)):
        async with stack.client(*order) as client:
            answer = await client.post(INFER, content=b" " * 9999, headers=headers)
            assert answer.status_code == expected
    call = RawCall(create_app(stack.services), INFER)
    await call.task  # nothing of the body ever comes
    assert call.status == 401


async def test_a_kept_answer_is_for_who_has_a_key(stack: Stack) -> None:
    """It would be nobody's in the other order, which helps nobody who has one, either."""
    for order, owner in (((), 200), (("Authentication", "Idempotency"), 401)):
        once = {"idempotency-key": f"once-{len(order)}"}
        async with stack.client(*order) as client:
            answers = [
                await client.post(INFER, json=asking(), headers=headers | once)
                for headers in (stack.key, stack.key, {})
            ]
        assert [answer.status_code for answer in answers] == [owner, owner, 401]
        replayed = ["idempotent-replayed" in answer.headers for answer in answers]
        assert replayed == [False, owner == 200, False]


async def test_a_body_that_is_too_long_is_not_gathered_for_a_key(stack: Stack) -> None:
    headers = {"content-type": "application/json", "idempotency-key": "k", **stack.key}
    call = RawCall(create_app(stack.services), INFER, headers=headers)
    for _ in range(3):
        call.feed(b" " * 512, more=True)  # and never an end
    await call.task
    assert call.status == 413


async def test_a_refusal_is_told_in_a_body(stack: Stack) -> None:
    for order in ((), ("Failures", "Authentication")):
        async with stack.client(*order) as client:
            answer = await client.get("/v1/models")
            told = answer.status_code == 401 and "error" in answer.json()
            assert told == (not order)


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/models/%00", 400), ("/v1/models", 401), ("/nope", 401)]
)
async def test_whoever_is_refused_has_an_id_safe_headers_and_is_written_down(
    stack: Stack, path: str, status: int
) -> None:
    async with stack.client() as client:
        answer = await client.get(path, headers={"origin": ORIGIN})
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    [event] = stack.world.recorder.finished
    assert (event.status, event.request_id) == (status, answer.headers["x-request-id"])


async def test_a_browser_may_ask_what_it_may_do_without_a_key(stack: Stack) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
    for order in ((), ("CORSMiddleware", "Authentication")):
        async with stack.client(*order) as client:
            answer = await client.options(INFER, headers=asked)
            assert (answer.status_code == 200) == (not order)
