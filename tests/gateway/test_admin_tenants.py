"""``/admin/v1``: tenants, keys, plans and the audit log over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.gateway.app import create_app
from deployments.observability.events import RequestFinished
from deployments.tenants.directory import Directory
from deployments.tenants.keys import Peppers, id_of
from deployments.tenants.ledger import Ledger
from models.contracts import NO_VERSIONS, Usage, Versions
from state.database import Database
from state.places import sqlite_url
from tests.gateway.contract import Contract
from tests.gateway.fakes import World

TENANTS = "/admin/v1/tenants"


@pytest.fixture
async def admin(
    world: World, tmp_path: Path, contract: Contract
) -> AsyncIterator[httpx.AsyncClient]:
    """Of an open platform, from this machine."""
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        world.directory = Directory(
            database, Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
        )
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(world.services()), client=("127.0.0.1", 1)),
            base_url="http://localhost",
            event_hooks={"response": [contract.check]},
        ) as client:
            yield client


def data(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


async def test_a_tenant_from_its_beginning(admin: httpx.AsyncClient) -> None:
    overrides = {"tokens_per_minute": 5, "requests_per_day": None}
    made = data(await admin.post(TENANTS, json={"name": "acme", "overrides": overrides}))
    assert (made["plan"], made["overrides"], made["suspended"]) == ("free", overrides, None)
    assert data(await admin.get(f"{TENANTS}/acme")) == made
    changed = data(await admin.patch(f"{TENANTS}/acme", json={"plan": "pro", "suspended": True}))
    assert changed["plan"] == "pro"
    assert changed["suspended"]
    assert data(await admin.get(TENANTS))["tenants"] == [changed]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "Acme"}, "name"),
        ({"name": "acme", "plan": "gold"}, "plan"),
        ({"name": "acme", "overrides": {"tokens_per_century": 1}}, "overrides"),
        ({}, "name"),
        ({"name": "acme", "colour": "red"}, "colour"),
    ],
)
async def test_what_cannot_be_a_tenant(
    admin: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    answer = await admin.post(TENANTS, json=body)
    assert answer.status_code == 400
    assert param in str(answer.json()["error"]["details"]["param"])


async def test_a_key_is_shown_once(admin: httpx.AsyncClient) -> None:
    await admin.post(TENANTS, json={"name": "acme"})
    asked = {"role": "operator", "scopes": ["inference"], "label": "shop", "lifetime_s": 3600}
    issued = data(await admin.post(f"{TENANTS}/acme/keys", json=asked))
    assert id_of(issued["key"]) == issued["id"]
    assert issued["scopes"] == ["inference"]
    [listed] = data(await admin.get(f"{TENANTS}/acme/keys"))["keys"]
    assert listed == {name: value for name, value in issued.items() if name != "key"}
    rotated = data(
        await admin.post(f"/admin/v1/keys/{issued['id']}/rotate", json={"overlap_s": 60})
    )
    assert rotated["key"] != issued["key"]
    revoked = data(await admin.delete(f"/admin/v1/keys/{issued['id']}"))
    assert revoked["revoked"]
    for answer in (await admin.get(f"{TENANTS}/acme/keys"), await admin.get("/admin/v1/audit")):
        assert issued["key"][-40:] not in answer.text


async def test_rights_beyond_the_role_are_refused(admin: httpx.AsyncClient) -> None:
    await admin.post(TENANTS, json={"name": "acme"})
    asked = {"role": "developer", "scopes": ["tenants:write"]}
    answer = await admin.post(f"{TENANTS}/acme/keys", json=asked)
    assert answer.status_code == 400
    assert "developer does not have tenants:write" in answer.json()["error"]["message"]


async def test_what_is_not_there(admin: httpx.AsyncClient) -> None:
    for method, path, body in (
        ("GET", f"{TENANTS}/nobody", None),
        ("PATCH", f"{TENANTS}/nobody", {"plan": "pro"}),
        ("GET", f"{TENANTS}/nobody/keys", None),
        ("POST", f"{TENANTS}/nobody/keys", {}),
        ("POST", "/admin/v1/keys/000000000000/rotate", {}),
        ("DELETE", "/admin/v1/keys/000000000000", None),
    ):
        answer = await admin.request(method, path, json=body)
        assert answer.status_code == 404, f"{method} {path}"
    await admin.post(TENANTS, json={"name": "acme"})
    assert (await admin.post(TENANTS, json={"name": "acme"})).status_code == 409


async def test_lists_are_paged(admin: httpx.AsyncClient) -> None:
    names = [f"t{number}" for number in range(5)]
    for name in names:
        await admin.post(TENANTS, json={"name": name})
    first = await admin.get(TENANTS, params={"limit": 2})
    second = await admin.get(TENANTS, params={"limit": 2, "cursor": first.headers["x-next-cursor"]})
    assert [tenant["name"] for tenant in data(second)["tenants"]] == names[2:4]


async def test_the_audit_log_is_paged_from_the_newest(admin: httpx.AsyncClient) -> None:
    for number in range(5):
        await admin.post(TENANTS, json={"name": f"t{number}"})
    seen: list[str] = []
    cursor, back = None, None
    while True:
        params = {"limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = await admin.get("/admin/v1/audit", params=params)
        seen += [entry["subject"] for entry in data(page)["entries"]]
        back = page.headers.get("x-prev-cursor", back)
        if (cursor := page.headers.get("x-next-cursor")) is None:
            break
    assert seen == ["t4", "t3", "t2", "t1", "t0"]
    assert back is not None
    before = await admin.get("/admin/v1/audit", params={"limit": "2", "cursor": back})
    assert [entry["subject"] for entry in data(before)["entries"]] == ["t2", "t1"]
    assert data(before)["entries"][0]["who"] == "anyone"
    for cursor in ("Pg", "PmFiYw", "nonsense!"):
        refused = await admin.get("/admin/v1/audit", params={"cursor": cursor})
        assert refused.status_code == 400


def used(tenant: str, *, cost: int, versions: Versions = NO_VERSIONS) -> RequestFinished:
    return RequestFinished(
        request_id="r",
        route="/v1/chat/completions",
        method="POST",
        status=200,
        code=None,
        duration_s=1,
        model="smollm2",
        tenant=tenant,
        versions=versions,
        usage=Usage(prompt_tokens=5, completion_tokens=7),
        cost=cost,
    )


async def test_usage_is_json_or_csv(admin: httpx.AsyncClient, world: World) -> None:
    assert data(await admin.get("/admin/v1/usage"))["lines"] == []
    assert world.directory is not None
    ledger = Ledger(world.directory.database, now=lambda: 1_700_000_000.0, clock=lambda: 0.0)
    for tenant, cost in (("acme", 2_500_000), ("acme", 1), ("other", 0)):
        ledger(used(tenant, cost=cost))
    await ledger.flush()
    told = data(await admin.get("/admin/v1/usage", params={"by": "tenant,model"}))
    assert told["currency"] == "USD"
    assert told["lines"][0] == {
        "tenant": "acme",
        "model": "smollm2",
        "requests": 2,
        "prompt_tokens": 10,
        "completion_tokens": 14,
        "cached_tokens": 0,
        "cost": 2.500001,
        "remembered_requests": 0,
        "remembered_tokens": 0,
    }
    table = await admin.get(
        "/admin/v1/usage", params={"by": "day", "tenant": "acme"}, headers={"accept": "text/csv"}
    )
    assert table.text.splitlines() == [
        "day,requests,prompt_tokens,completion_tokens,cached_tokens,cost,remembered_requests,"
        "remembered_tokens",
        "2023-11-14,2,10,14,0,2.500001,0,0",
    ]
    refused = await admin.get("/admin/v1/usage", params={"by": "colour"})
    assert refused.status_code == 400


async def test_plans_are_those_of_the_configuration(admin: httpx.AsyncClient) -> None:
    plans = {
        plan["name"]: plan["limits"] for plan in data(await admin.get("/admin/v1/plans"))["plans"]
    }
    assert list(plans) == ["enterprise", "free", "pro"]
    assert plans["free"]["requests_per_minute"] == 60
    assert plans["enterprise"]["tokens_per_day"] == 100_000_000
    assert plans["pro"]["budget_per_month"] is None
    first = await admin.get("/admin/v1/plans", params={"limit": 2})
    rest = await admin.get(
        "/admin/v1/plans", params={"limit": 2, "cursor": first.headers["x-next-cursor"]}
    )
    assert [plan["name"] for plan in data(rest)["plans"]] == ["pro"]
    assert "x-next-cursor" not in rest.headers


async def test_usage_is_paged(admin: httpx.AsyncClient, world: World) -> None:
    assert world.directory is not None
    ledger = Ledger(world.directory.database, now=lambda: 1_700_000_000.0, clock=lambda: 0.0)
    versions = [None, "chat@1", "chat@10", "chat@2", "m'\"x"]
    for version in [*versions, "chat@2"]:
        ledger(used("acme", cost=1, versions=Versions(model=version)))
    await ledger.flush()
    query: dict[str, str | int] = {"by": "model_version,tenant", "limit": 2}
    pages, cursors, back = [], [], []
    cursor: dict[str, str] = {}
    while True:
        page = await admin.get("/admin/v1/usage", params=query | cursor)
        pages.append([line.get("model_version") for line in data(page)["lines"]])
        back.append(page.headers.get("x-prev-cursor"))
        if "x-next-cursor" not in page.headers:
            break
        cursor = {"cursor": page.headers["x-next-cursor"]}
        cursors.append(cursor)
    assert pages == [[None, "chat@1"], ["chat@10", "chat@2"], ["m'\"x"]]
    assert back[0] is None
    assert back[2] is not None
    before = await admin.get("/admin/v1/usage", params=query | {"cursor": back[2]})
    assert [line["requests"] for line in data(before)["lines"]] == [1, 2]
    table = {"accept": "text/csv"}
    paged = await admin.get("/admin/v1/usage", params=query | cursors[0], headers=table)
    assert [line.split(",")[0] for line in paged.text.splitlines()[1:]] == ["chat@10", "chat@2"]
    assert paged.headers["x-next-cursor"]
    whole = await admin.get("/admin/v1/usage", params={"by": "model_version"}, headers=table)
    assert len(whole.text.splitlines()) == 1 + len(versions)
    assert "x-next-cursor" not in whole.headers
    wrong = [*cursors[0].values(), "Pg", "PlsiXHUwMDAwIl0", "PlsiXHVkODAwIl0", "Pls1XQ"]
    for text in wrong:  # of another list, or of none that anybody could have given out
        refused = await admin.get("/admin/v1/usage", params={"by": "day", "cursor": text})
        assert refused.status_code == 400, text


async def test_a_gateway_without_a_database_says_so(world: World, contract: Contract) -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(world.services()), client=("127.0.0.1", 1)),
        base_url="http://localhost",
        event_hooks={"response": [contract.check]},
    ) as client:
        answer = await client.get(TENANTS)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "STATE_UNAVAILABLE"
