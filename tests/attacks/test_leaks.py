"""What must not be seen: keys, secrets and people, in logs, errors, events and the database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from deployments.config import GatewayConfig, GuardrailsConfig, PlanConfig
from deployments.gateway.app import create_app
from deployments.gateway.services import Services
from deployments.observability.events import discard
from deployments.observability.logs import JsonFormatter, log_failures
from deployments.tenants.directory import Directory
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.identity import KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.ledger import Ledger
from deployments.tenants.meter import Meter
from deployments.tenants.principal import Role
from deployments.webhooks.inbox import Inbox
from deployments.webhooks.signature import signed
from deployments.webhooks.sources import Source, Sources
from models.errors import InvalidInput, UpstreamError
from state import tables
from state.counters import Strategy, open_counters
from state.database import Database
from state.errors import StateUnavailable
from state.places import sqlite_url
from tests.attacks.dial import Dial
from tests.gateway.asgi import BASE
from tests.gateway.fakes import NOW, World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting

PEPPER, WEBHOOK = "pepper-of-16-or-more", b"webhook-secret-of-16"
MAIL, CARD, QUESTION = "ann@example.org", "4111 1111 1111 1111", "what-ann-wants-to-know"


@dataclass
class Platform:
    """All that the gateway has, for real, and whatever it has told anybody."""

    services: Services
    world: World
    database: Database
    ledger: Ledger
    keys: dict[Role, str]
    file: Path
    log: pytest.LogCaptureFixture

    @asynccontextmanager
    async def client(self, role: Role | None) -> AsyncIterator[httpx.AsyncClient]:
        headers = {} if role is None else {"authorization": f"Bearer {self.keys[role]}"}
        transport = httpx.ASGITransport(create_app(self.services), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=headers) as client:
            yield client

    def secrets(self) -> Iterator[str]:
        """What nobody may read anywhere."""
        yield from (key.split("_")[2] for key in self.keys.values())
        yield PEPPER
        yield WEBHOOK.decode()

    def people(self) -> Iterator[str]:
        yield from (MAIL, CARD, QUESTION)

    def logged(self) -> str:
        """As it is written, tracebacks included."""
        formatter = JsonFormatter()
        return "\n".join(formatter.format(record) for record in self.log.records)

    async def written(self) -> bytes:
        """All that is on the disk."""
        await self.ledger.flush()
        files = self.file.parent.glob(f"{self.file.name}*")
        return b"".join([file.read_bytes() for file in files])


@pytest.fixture
async def platform(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Platform]:
    caplog.set_level(logging.DEBUG)
    world.config = GatewayConfig(
        plans={"free": PlanConfig(requests_per_minute=10_000)},
        guardrails=GuardrailsConfig.model_validate(
            {"pii": {"email": {"input": "mask"}, "card": {"input": "refuse"}}}
        ),
    )
    peppers = Peppers.of({"FRONTIER_KEY_SECRETS": PEPPER})
    file = tmp_path / "frontier.db"
    async with await Database.open(sqlite_url(file)) as database:
        directory = Directory(database, peppers)
        await directory.create("acme", plan="free", by="me")
        keys = {role: (await directory.issue("acme", role=role, by="me"))[1].text for role in Role}
        ledger = Ledger(database, now=lambda: NOW, clock=lambda: 0.0)

        def emit(event: Any) -> None:
            world.recorder(event)
            log_failures(event)
            ledger(event)

        counters = open_counters(f"sqlite:///{tmp_path / 'counters.db'}")
        meter = Meter(
            counters=counters,
            plans=world.config.plans,
            strategy=Strategy.SLIDING_WINDOW,
            prices={},
            emit=discard,
            check=ledger.check,
        )
        world.directory = directory
        world.authenticator = KeyAuthenticator(directory, peppers, clock=lambda: 0.0)
        source = Source(name="default", tenant="acme", secrets=lambda: (WEBHOOK,))
        services = replace(
            world.services(),
            emit=emit,
            meter=meter,
            idempotency=IdempotencyRecords(database, ttl_s=3600),
            inbox=Inbox(database, dedupe_s=3600),
            webhook_sources=Sources({"default": source}),
        )
        yield Platform(services, world, database, ledger, keys, file, caplog)
        await meter.close()


def about(text: str, **fields: Any) -> dict[str, Any]:
    return chatting(messages=[{"role": "user", "content": text}], **fields)


async def misuse(platform: Platform) -> list[httpx.Response]:
    """Requests of all sorts, most of them wrong, with secrets where they belong and elsewhere."""
    key, world = platform.keys[Role.DEVELOPER], platform.world
    said = f"{QUESTION}, write to {MAIL}"
    answers = []
    async with platform.client(Role.DEVELOPER) as developer, platform.client(None) as nobody:

        async def ask(body: Any, **headers: str) -> None:
            answers.append(await developer.post(CHAT, json=body, headers=headers))

        await ask(about(said))
        await ask(about(said, stream=True))
        await ask(about(said), **{"idempotency-key": "a"})
        await ask(about(said), **{"idempotency-key": "a"})
        await ask(about(said + "?"), **{"idempotency-key": "a"})
        await ask(about(f"my card is {CARD}"))
        await ask(about(said, max_tokens=-1))
        await ask({"messages": said})
        for error in (
            UpstreamError("The replica of smollm2 that was answering was lost."),
            InvalidInput("temperature should be lower", param="temperature"),
            StateUnavailable("the database did not answer"),
            ZeroDivisionError("division by zero"),
        ):
            world.generator.error = error
            await ask(about(said))
            await ask(about(said, stream=True))
            world.generator.error_after = 1
            await ask(about(said, stream=True))
            world.generator.error_after = 0
        world.generator.error = None
        answers.append(
            await developer.post("/v1/embeddings", json={"model": "minilm", "input": said})
        )
        predict = {"inputs": [{"text": said}]}
        answers.append(await developer.post("/v1/models/digits/predict", json=predict))
        wrong = {"authorization": f"Bearer {key}0"}
        answers.append(await nobody.post(CHAT, json=about(said), headers=wrong))
        answers.append(await nobody.post(CHAT, json=about(said), headers={"x-api-key": key[:-1]}))
        answers.append(await developer.post("/admin/v1/tenants", json={"name": "x"}))
        async with platform.client(Role.ADMIN) as admin:
            answers.append(await admin.get("/admin/v1/tenants/acme/keys"))
            answers.append(await admin.get("/admin/v1/audit"))
            answers.append(await admin.get("/admin/v1/usage"))
            answers.append(await admin.post("/admin/v1/tenants", json={"name": said}))
        for secret in (WEBHOOK, b"of-somebody-else-of-16"):
            body = b'{"id":"evt_1","type":"t","payload":{"n":1}}'
            headers = {
                "content-type": "application/json",
                "x-webhook-signature": signed(body, (secret,), at=int(NOW)),
            }
            answers.append(await nobody.post("/webhooks/ingest", content=body, headers=headers))
    headers = {"authorization": f"Bearer {key}"}
    async with Dial(create_app(platform.services), "/v1/infer/ws", headers) as socket:
        await socket.say({"type": "infer", "id": "a", "model": "smollm2", "prompt": said})
        while (await socket.hear())["event"] == "token":
            pass
        await socket.say({"type": "infer", "id": "b", "model": key, "prompt": said})
        await socket.hear()
    return answers


async def test_nobody_reads_a_secret(platform: Platform) -> None:
    answers = await misuse(platform)
    assert {answer.status_code for answer in answers} >= {200, 400, 401, 403, 409, 500, 502, 503}
    told = [answer.text + str(answer.headers) for answer in answers]
    events = repr(platform.world.recorder.events)
    written, logged = await platform.written(), platform.logged()
    assert "division by zero" in logged, "there are logs at all"
    for secret in platform.secrets():
        assert secret not in logged
        assert secret not in events
        assert secret.encode() not in written
        assert not any(secret in one for one in told)


async def test_logs_and_accounts_do_not_say_what_people_have_said(platform: Platform) -> None:
    await misuse(platform)
    events, written, logged = (
        repr(platform.world.recorder.events),
        await platform.written(),
        platform.logged(),
    )
    for words in platform.people():
        assert words not in logged
        assert words not in events
        assert words.encode() not in written


async def test_a_failure_that_quotes_a_prompt_is_logged_without_whom_it_is_about(
    platform: Platform,
) -> None:
    """Whoever raises it did not think of that; the frames and the rest of the words stay."""
    said = f"write to {MAIL}"

    def broken() -> ValueError:
        error = ValueError(f"cannot read {said!r}: {CARD} is no date")
        error.__cause__ = KeyError(said)
        return error

    world = platform.world
    async with platform.client(Role.DEVELOPER) as client:
        for stream, after in ((False, 0), (True, 0), (True, 1)):
            world.generator.error, world.generator.error_after = broken(), after
            answer = await client.post(CHAT, json=about(said, stream=stream))
            assert MAIL not in answer.text
    headers = {"authorization": f"Bearer {platform.keys[Role.DEVELOPER]}"}
    world.generator.error_after = 0
    async with Dial(create_app(platform.services), "/v1/infer/ws", headers) as socket:
        await socket.say({"type": "infer", "id": "a", "model": "smollm2", "prompt": said})
        assert (await socket.hear())["event"] == "error"
    logged = platform.logged()
    assert logged.count("ValueError: cannot read 'write to [EMAIL]': [CARD] is no date") == 4
    assert logged.count("KeyError: 'write to [EMAIL]'") == 4
    assert "raise self.error" in logged, "where it was"
    assert MAIL not in logged
    assert CARD not in logged


async def test_a_refusal_does_not_repeat_what_was_found(platform: Platform) -> None:
    """A guardrail's: it is kept for whoever asks again, and may be logged by a client."""
    async with platform.client(Role.DEVELOPER) as client:
        answer = await client.post(CHAT, json=about(f"my card is {CARD}"))
        assert answer.status_code == 400
        assert CARD not in answer.text


async def test_a_statement_that_fails_does_not_say_what_it_carried(platform: Platform) -> None:
    """SQLAlchemy would write it into the error, and the error ends in a log."""
    insert = tables.tenants.insert().values(
        name="acme", plan=MAIL, overrides={}, created=sa.func.now()
    )
    with pytest.raises(sa.exc.IntegrityError) as told:
        async with platform.database.write() as connection:
            await connection.execute(insert)
    assert MAIL not in str(told.value)


async def test_an_answer_to_one_is_not_in_the_answers_to_others(platform: Platform) -> None:
    """At the same time, in one process: what a request says is not to be met in another one."""
    async with platform.client(Role.DEVELOPER) as client:
        platform.world.generator.delay_s = 0.01

        async def ask(number: int) -> httpx.Response:
            body: dict[str, Any] = about(f"mark-{number:03}", user=f"user-{number:03}")
            if number % 3 == 0:
                body["temperature"] = f"mark-{number:03}"  # refused, and told why
            headers = {"x-request-id": f"mark-{number:03}"}
            return await client.post(CHAT, json=body, headers=headers)

        answers = await asyncio.gather(*(ask(number) for number in range(60)))
    for number, answer in enumerate(answers):
        text = answer.text + str(answer.headers)
        assert f"mark-{number:03}" in text
        assert not any(f"mark-{other:03}" in text for other in range(60) if other != number)
