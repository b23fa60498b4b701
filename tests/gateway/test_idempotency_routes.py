"""Every POST route takes an ``Idempotency-Key``; and a gateway process that is killed over one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from starlette.types import ASGIApp

from deployments.gateway.app import create_app, routes
from deployments.gateway.operation import Operation, Repeat
from deployments.launcher.background import REPOSITORY
from deployments.tenants.directory import Directory
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.keys import Peppers
from deployments.webhooks.inbox import Inbox
from deployments.webhooks.signature import signed
from deployments.webhooks.sources import Source, Sources
from state import tables
from state.database import Database, LazyDatabase
from state.places import sqlite_url
from tests.attacks.test_bodies import GOOD, LOCAL, SECRET
from tests.gateway.asgi import BASE
from tests.gateway.contract import Contract
from tests.gateway.fakes import NOW, World
from tests.gateway.test_infer import PATH as INFER
from tests.gateway.test_infer import asking
from tests.servers import free_port

pytestmark = pytest.mark.integration

POSTS = {
    f"{each.method} {each.path_format}": each
    for each in routes(World().services())
    if each.method == "POST"
}


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[LazyDatabase]:
    database = LazyDatabase(sqlite_url(tmp_path / "frontier.db"))
    yield database
    await database.close()


@pytest.fixture
async def directory(database: LazyDatabase) -> Directory:
    directory = Directory(database, Peppers((b"0" * 16,)))
    await directory.create("acme", plan="free", by="me")
    return directory


@pytest.fixture
def app(world: World, database: LazyDatabase, directory: Directory) -> ASGIApp:
    source = Source(name="default", tenant="acme", secrets=lambda: (SECRET,))
    world.directory = directory
    services = replace(
        world.services(),
        inbox=Inbox(database, dedupe_s=3600),
        webhook_sources=Sources({"default": source}),
        idempotency=IdempotencyRecords(database, ttl_s=3600),
    )
    return create_app(services)


@pytest.mark.parametrize("operation", POSTS.values(), ids=POSTS)
async def test_a_post_is_carried_out_once_for_a_key(
    app: ASGIApp, directory: Directory, contract: Contract, operation: Operation
) -> None:
    path, body = GOOD[f"POST {operation.path_format}"]
    if "{key}" in operation.path_format:
        key, _ = await directory.issue("acme", by="me")
        path = path.replace("0" * 12, key.id)

    async def send(client: httpx.AsyncClient, what: dict[str, Any]) -> httpx.Response:
        raw = json.dumps(what).encode()
        signature = {"x-webhook-signature": signed(raw, (SECRET,), at=int(NOW))}
        headers = {**LOCAL, **signature, "idempotency-key": "5f9c6b1e"}
        return await client.post(path, content=raw, headers=headers)

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        client.event_hooks = {"response": [contract.check]}
        first = await send(client, body)
        assert first.status_code == 200, first.text
        again = await send(client, body)
        match operation.repeat:
            case Repeat.REPLAYED:
                assert again.status_code == 200
                assert again.content == first.content
                assert again.headers["idempotent-replayed"] == "true"
            case Repeat.REFUSED:
                assert again.status_code == 409
                assert "secret" in again.json()["error"]["message"]
            case Repeat.LEFT_TO_ROUTE:
                told = [answer.json()["data"]["duplicate"] for answer in (first, again)]
                assert told == [False, True]
        assert "idempotent-replayed" not in first.headers
        value = next(name for name, given in body.items() if isinstance(given, str | int | list))
        other = await send(client, body | {value: _another(body[value])})
        assert other.status_code == 409, other.text
        assert "another" in str(other.json()["error"]["message"])


def _another(value: Any) -> Any:
    return value + 1 if isinstance(value, int) else value[:0] + type(value)("x")


def test_only_a_webhook_knows_better() -> None:
    """Whoever leaves it to a route has to say here that the route does it."""
    left = {name for name, each in POSTS.items() if each.repeat is Repeat.LEFT_TO_ROUTE}
    assert left == {"POST /webhooks/ingest"}


LEASE_S = 3.0


@contextmanager
def process(url: str, delay_s: float) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A gateway that answers, and how it is reached."""
    port = free_port()
    running = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.gateway.crashing"),
            *(url, str(port), str(delay_s), str(LEASE_S)),
        ],
        cwd=REPOSITORY,
    )
    try:
        reached, give_up = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{reached}/healthz", timeout=5)
                break
            except httpx.TransportError:
                assert running.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.05)
        yield running, reached
    finally:
        running.kill()
        running.wait()


async def claimed(url: str) -> None:
    """Until there is a record, which nobody has finished."""
    async with await Database.open(url) as database, asyncio.timeout(30):
        while True:
            async with database.read() as c:
                finished = (await c.execute(sa.select(tables.idempotency.c.finished))).all()
            if finished:
                assert finished == [(None,)]
                return
            await asyncio.sleep(0.02)


@pytest.mark.timeout(180)
def test_what_a_killed_process_has_begun_is_done_by_another_when_the_lease_is_over(
    tmp_path: Path,
) -> None:
    url = sqlite_url(tmp_path / "frontier.db")
    headers = {"idempotency-key": "5f9c6b1e"}
    with ExitStack() as stack:
        doomed, slow = stack.enter_context(process(url, delay_s=600))
        _, other = stack.enter_context(process(url, delay_s=0))
        ask = partial(httpx.post, f"{slow}{INFER}", json=asking(), headers=headers, timeout=60)
        asked = stack.enter_context(ThreadPoolExecutor()).submit(ask)
        asyncio.run(claimed(url))
        doomed.kill()
        assert isinstance(asked.exception(timeout=30), httpx.TransportError), "it had no answer"
        conflict = httpx.post(f"{other}{INFER}", json=asking(prompt="other"), headers=headers)
        assert conflict.status_code == 409, "the key is known though nothing was answered"
        began = time.monotonic()
        first = httpx.post(f"{other}{INFER}", json=asking(), headers=headers, timeout=30)
        assert first.status_code == 200, first.text
        assert time.monotonic() - began < LEASE_S + 10
        assert "idempotent-replayed" not in first.headers, "it is done now"
        again = httpx.post(f"{other}{INFER}", json=asking(), headers=headers, timeout=30)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.content == first.content
