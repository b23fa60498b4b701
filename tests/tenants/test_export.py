"""All that is held of a tenant, nothing of others, and no secrets."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from contextlib import aclosing
from typing import Any

import pytest

from deployments.tenants import export as module
from deployments.tenants.directory import Directory
from deployments.tenants.export import KINDS, Line, export
from deployments.tenants.visibility import Visibility
from models.errors import Conflict, NotFound
from state import tables
from tests.tenants.things import NOW, SECRET_ANSWER, settle_in, use


async def exported(directory: Directory, tenant: str) -> list[dict[str, Any]]:
    encoded = [line.encode() async for line in export(directory.database, tenant, by="auditor")]
    assert all(line.isascii() and line.count(b"\n") == 1 for line in encoded)
    return [json.loads(line) for line in encoded]


def kinds(lines: list[dict[str, Any]]) -> Counter[str]:
    return Counter(line["kind"] for line in lines)


async def test_everything_is_there(directory: Directory) -> None:
    key = await settle_in(directory, "acme")
    lines = await exported(directory, "acme")
    assert set(kinds(lines)) == set(KINDS)
    assert kinds(lines) == {
        "tenant": 1,
        "key": 2,
        "visibility": 1,
        "usage": 3,
        "alert": 1,
        "idempotency": 1,
        "webhook_event": 1,
        "audit": 6,
        "end": 1,
    }
    by_kind = {line["kind"]: line["data"] for line in lines}
    assert by_kind["tenant"]["overrides"] == {"tokens_per_day": 5}
    assert by_kind["key"]["label"] == "the shop of acme"
    assert by_kind["usage"]["completion_tokens"] == 7
    assert by_kind["usage"]["model_version"] == "smollm2@1"
    assert by_kind["usage"]["adapter_version"] == "acme-bot@1"
    assert by_kind["idempotency"]["key"] == "order-1"
    assert by_kind["idempotency"]["body_bytes"] == len(SECRET_ANSWER)
    assert by_kind["webhook_event"]["payload"] == '{"customer": "acme",\n "amount": 1.10}'
    assert lines[-1] == {"kind": "end", "data": {"lines": len(lines) - 1}}
    acts = [line["data"] for line in lines if line["kind"] == "audit"]
    assert [act["what"] for act in acts] == [
        "tenant.create",
        "key.issue",
        "key.issue",
        "key.rotate",
        "model.visibility",
        "tenant.export",
    ]
    assert acts[-1]["who"] == "auditor"
    assert acts[3]["subject"] == key


async def test_no_table_of_tenants_is_forgotten() -> None:
    """A new one with a column ``tenant`` belongs into an export, and into a deletion."""
    known = {"api_keys", "usage", "idempotency", "webhook_events", "alerts"}
    found = {table.name for table in tables.metadata.sorted_tables if "tenant" in table.c}
    assert found == known


async def test_no_secret_is_there(directory: Directory) -> None:
    await settle_in(directory, "acme")
    text = json.dumps(await exported(directory, "acme"))
    for key in await directory.keys("acme"):
        assert key.id in text
        assert key.digest not in text
    assert SECRET_ANSWER.decode() not in text


async def test_nothing_of_others_is_there(directory: Directory) -> None:
    await settle_in(directory, "acme")
    await settle_in(directory, "rival")
    await Visibility(directory.database).show("smollm2", ["acme", "rival"], by="me")
    rivals = await directory.keys("rival")
    text = json.dumps(await exported(directory, "acme"))
    assert "rival" not in text
    assert all(key.id not in text for key in rivals)


async def test_what_its_keys_did_is_there_without_whom_they_did_it_to(
    directory: Directory,
) -> None:
    key = await settle_in(directory, "acme")
    await directory.create("rival", plan="pro", overrides={"tokens_per_day": 77}, by=f"key:{key}")
    lines = await exported(directory, "acme")
    acts = [line["data"] for line in lines if line["kind"] == "audit"]
    [act] = [act for act in acts if act["who"] == f"key:{key}"]
    assert (act["what"], act["details"]) == ("tenant.create", {})


async def test_who_is_not_there(directory: Directory) -> None:
    with pytest.raises(NotFound):
        await exported(directory, "nobody")
    await directory.create("acme", plan="free", by="me")
    async with directory.database.write() as c:
        await c.execute(tables.tenants.update().values(deleted_as="(deleted 1)"))
    with pytest.raises(Conflict, match="being deleted"):
        await exported(directory, "acme")


async def test_it_is_one_moment(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes while it is read is in none of its lines; and little is read ahead."""
    monkeypatch.setattr(module, "ROWS", 2)
    await settle_in(directory, "acme", uses=20)
    lines: list[Line] = []
    async with aclosing(export(directory.database, "acme", by="me")) as held:
        async for line in held:
            lines.append(line)
            if line.kind == "usage":
                await use(directory.database, "acme")
    assert Counter(line.kind for line in lines)["usage"] == 20


async def test_a_long_export_takes_no_more_memory_than_a_short_one(directory: Directory) -> None:
    await directory.create("acme", plan="free", by="me")
    size, events = 100_000, 400
    async with directory.database.write() as c:
        for number in range(events):
            event = {"source": "s", "event_id": "e", "type": "t", "signed": NOW, "received": NOW}
            event |= {"tenant": "acme", "key": f"{number}", "body_sha256": "b" * 64}
            await c.execute(tables.webhook_events.insert().values(**event, payload="x" * size))
    exported = 0
    tracemalloc.start()
    try:
        async with aclosing(export(directory.database, "acme", by="me")) as held:
            async for line in held:
                exported += len(line.encode())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert exported > size * events
    assert peak < exported / 4


async def test_who_goes_away_in_the_middle_leaves_nothing_open(directory: Directory) -> None:
    await settle_in(directory, "acme", uses=500)
    for _ in range(20):  # more than there are connections
        async with aclosing(export(directory.database, "acme", by="me")) as held:
            async for line in held:
                if line.kind == "usage":
                    break
    await directory.create("other", plan="free", by="me")
