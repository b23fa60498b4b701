"""Bearer tokens of a real issuer, and API keys, at one and the same gateway over HTTP."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from deployments.config import AuthConfig, OidcConfig
from deployments.gateway.app import create_app
from deployments.tenants.directory import Directory
from deployments.tenants.entrance import authenticator
from deployments.tenants.keys import Peppers
from state.database import Database
from state.places import sqlite_url
from tests.gateway.asgi import BASE
from tests.gateway.contract import Contract
from tests.gateway.fakes import World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking
from tests.tenants.test_oidc import Issuer

SKEW_S = 60
FAR_S = 30
"""From a bound, so that a busy machine is not the other side of it."""


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer.running() as issuer:
        yield issuer


@pytest.fixture
async def directory(tmp_path: Path) -> AsyncIterator[Directory]:
    peppers = Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        made = Directory(database, peppers)
        await made.create("acme", plan="pro", by="me")
        yield made


@pytest.fixture
async def client(
    world: World, directory: Directory, issuer: Issuer, contract: Contract
) -> AsyncIterator[httpx.AsyncClient]:
    oidc = OidcConfig(issuer=issuer.url, audience="frontier-run", clock_skew_s=SKEW_S)
    world.directory = directory
    world.authenticator = authenticator(
        AuthConfig(mode="keys", oidc=oidc), directory, directory.peppers
    )
    issuer.broken = False
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(world.services()), raise_app_exceptions=False),
        base_url=BASE,
        event_hooks={"response": [contract.check]},
    ) as client:
        yield client


def bearing(credential: str) -> dict[str, str]:
    return {"authorization": f"Bearer {credential}"}


async def test_a_token_and_a_key_are_each_taken_for_what_they_are(
    client: httpx.AsyncClient, world: World, directory: Directory, issuer: Issuer
) -> None:
    key, minted = await directory.issue("acme", by="me")
    for credential in (issuer.token(), minted.text):
        answer = await client.post(CHAT, json=asking(), headers=bearing(credential))
        assert answer.status_code == 200, answer.text
    who = [(event.tenant, event.subject) for event in world.recorder.finished]
    assert who == [("acme", "oidc:alice"), ("acme", f"key:{key.id}")]


async def test_a_token_s_role_decides(
    client: httpx.AsyncClient, directory: Directory, issuer: Issuer
) -> None:
    auditor, admin = (bearing(issuer.token(role=role)) for role in ("auditor", "admin"))
    assert (await client.get("/admin/v1/audit", headers=auditor)).status_code == 200
    assert (await client.post(CHAT, json=asking(), headers=auditor)).status_code == 403
    made = await client.post("/admin/v1/tenants", json={"name": "other"}, headers=admin)
    assert made.status_code == 200
    assert (await directory.audit(limit=1))[0].who == "oidc:alice"


async def test_a_token_is_good_for_as_long_as_clocks_may_differ(
    client: httpx.AsyncClient, issuer: Issuer
) -> None:
    now = time.time()
    for claims, status in (
        ({"exp": now - SKEW_S + FAR_S}, 200),
        ({"exp": now - SKEW_S - FAR_S}, 401),
        ({"nbf": now + SKEW_S - FAR_S}, 200),
        ({"nbf": now + SKEW_S + FAR_S}, 401),
    ):
        answer = await client.get("/v1/models", headers=bearing(issuer.token(**claims)))
        assert answer.status_code == status, claims


async def test_what_the_issuer_has_not_said_is_refused(
    client: httpx.AsyncClient, issuer: Issuer
) -> None:
    header, body, _ = issuer.token().split(".")
    none = base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": "one"}).encode())
    unsigned = f"{none.decode().rstrip('=')}.{body}."
    forged = f"{header}.{body}.{'A' * 342}"
    for credential in (unsigned, forged, issuer.token(aud="another"), "neither.a.token"):
        answer = await client.get("/v1/models", headers=bearing(credential))
        assert answer.status_code == 401, credential
        assert answer.json()["error"]["code"] in ("UNAUTHORIZED", "invalid_api_key")


async def test_an_issuer_that_is_out_of_reach_leaves_keys_as_they_are(
    client: httpx.AsyncClient, directory: Directory, issuer: Issuer
) -> None:
    _, minted = await directory.issue("acme", by="me")
    issuer.broken = True
    token, key = bearing(issuer.token()), bearing(minted.text)
    assert (await client.get("/v1/models", headers=token)).status_code == 503
    assert (await client.get("/v1/models", headers=key)).status_code == 200
