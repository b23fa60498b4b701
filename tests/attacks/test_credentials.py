"""Ways of being somebody else: no key, a made-up key, a key that was, headers that say so."""

from __future__ import annotations

import ast
import hmac
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from deployments.gateway.app import create_app
from deployments.tenants import keys as keys_module
from deployments.tenants.directory import Directory
from deployments.tenants.identity import BAD, FRESH_S, KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.principal import Role, Scope
from deployments.webhooks import signature
from models.errors import Unauthorized
from state.database import Database
from tests.attacks.dial import Dial
from tests.gateway.contract import Contract
from tests.gateway.test_authentication import Secured, secured
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking

__all__ = ["secured"]

MODELS, TENANTS, SOCKET = "/v1/models", "/admin/v1/tenants", "/v1/infer/ws"

Forge = Callable[[str], str]
FORGERIES: Mapping[str, Forge] = {
    "nothing": lambda key: "",
    "a word": lambda key: "admin",
    "a part": lambda key: key[:-1],
    "more": lambda key: key + "0",
    "in capitals": lambda key: key.upper(),
    "its last digit changed": lambda key: key[:-1] + ("0" if key[-1] != "0" else "1"),
    "its id alone": lambda key: key[:15],
    "another's id": lambda key: f"fr_{'0' * 12}_{key[16:]}",
    "another's secret": lambda key: f"{key[:16]}{'0' * 40}",
    "with a NUL": lambda key: key + "\0",
    "with a blank inside": lambda key: f"{key[:20]} {key[20:]}",
    "digits of other scripts": lambda key: key.replace(key[-1], "\xb2"),
    "twice": lambda key: f"{key}, Bearer {key}",
    "with SQL": lambda key: f"{key}' OR '1'='1",
    "as a wildcard": lambda key: "fr_" + "%" * 12 + "_" + "%" * 40,
    "very long": lambda key: key + "0" * 60_000,
    "a token without a signature": lambda key: "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.",
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
async def test_nothing_but_a_whole_key_opens(
    secured: Secured, contract: Contract, forge: Forge
) -> None:
    forged = forge(secured.keys[Role.ADMIN])
    async with secured.client(contract, None) as client:
        for headers in (
            [(b"authorization", b"Bearer " + forged.encode("latin-1"))],
            [(b"x-api-key", forged.encode("latin-1"))],
        ):
            answer = await client.get(MODELS, headers=headers)
            assert answer.status_code == 401
            assert secured.keys[Role.ADMIN][16:] not in answer.text


async def test_the_id_of_one_key_with_the_secret_of_another(
    secured: Secured, contract: Contract
) -> None:
    """Both are real, and each opens by itself."""
    admin, developer = (secured.keys[role] for role in (Role.ADMIN, Role.DEVELOPER))
    assert len(admin) == len(developer)
    async with secured.client(contract, None) as client:

        async def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return (await client.get(MODELS, headers=headers)).status_code

        assert await status(admin) == await status(developer) == 200
        assert await status(admin[:16] + developer[16:]) == 401
        assert await status(developer[:16] + admin[16:]) == 401


async def test_a_key_that_was(secured: Secured, contract: Contract) -> None:
    """All are refused in the same words: who has lost a key does not learn why it is dead."""
    issue = secured.directory.issue
    _, expired = await issue("acme", lifetime=timedelta(seconds=-1), by="me")
    revoked_key, revoked = await issue("acme", by="me")
    await secured.directory.revoke(revoked_key.id, by="me")
    rotated_key, rotated = await issue("acme", by="me")
    await secured.directory.rotate(rotated_key.id, overlap=timedelta(0), by="me")
    async with secured.client(contract, None) as client:
        for minted in (expired, revoked, rotated):
            answer = await client.get(
                "/admin/v1/plans", headers={"authorization": f"Bearer {minted.text}"}
            )
            assert answer.status_code == 401
            assert answer.json()["error"]["message"] == BAD


SPOOFS = {
    "x-forwarded-for": "127.0.0.1",
    "x-forwarded-host": "localhost",
    "x-forwarded-user": "admin",
    "x-forwarded-prefix": "/healthz",
    "forwarded": "for=127.0.0.1;host=localhost",
    "x-real-ip": "127.0.0.1",
    "x-original-url": "/healthz",
    "x-rewrite-url": "/healthz",
    "x-http-method-override": "GET",
    "x-method-override": "GET",
    "host": "localhost",
    "x-tenant": "acme",
    "x-tenant-id": "acme",
    "x-user": "admin",
    "x-role": "admin",
    "x-scope": "tenants:write",
    "cookie": "key=admin; session=admin",
    "proxy-authorization": "Bearer admin",
    "x_api_key": "admin",
    "x-serve-application": "other",
    "serve_multiplexed_model_id": "other",
}


@pytest.mark.parametrize("name", SPOOFS)
async def test_no_header_but_the_key_says_who_it_is(
    secured: Secured, contract: Contract, name: str
) -> None:
    headers = {name: SPOOFS[name]}
    async with secured.client(contract, None) as nobody:
        assert (await nobody.get(MODELS, headers=headers)).status_code == 401
        assert (await nobody.get(TENANTS, headers=headers)).status_code == 401
    async with secured.client(contract, Role.DEVELOPER) as developer:
        assert (await developer.get(TENANTS, headers=headers)).status_code == 403
        assert (await developer.post(CHAT, json=asking(), headers=headers)).status_code == 200
    assert secured.world.generator.requests[-1].tenant == "acme"
    assert {each.tenant for each in secured.world.recorder.finished} == {"public", "acme"}


async def test_a_method_is_what_the_request_line_says(secured: Secured, contract: Contract) -> None:
    path = f"/admin/v1/keys/{secured.ids[Role.DEVELOPER]}"
    async with secured.client(contract, Role.ADMIN) as admin:
        for name in ("x-http-method-override", "x-http-method", "x-method-override"):
            assert (await admin.post(path, headers={name: "DELETE"})).status_code == 405
            assert (await admin.get(f"{path}?_method=DELETE")).status_code == 405
    keys = await secured.directory.keys("acme")
    assert not any(key.revoked for key in keys)


async def test_several_credentials(secured: Secured, contract: Contract) -> None:
    """One of them could be judged by a proxy in front, and the other by us."""
    admin = b"Bearer " + secured.keys[Role.ADMIN].encode()
    developer = b"Bearer " + secured.keys[Role.DEVELOPER].encode()
    async with secured.client(contract, None) as client:

        async def status(*values: bytes) -> int:
            headers = [(b"authorization", value) for value in values]
            return (await client.get(TENANTS, headers=headers)).status_code

        assert await status(admin, developer) == await status(developer, admin) == 401
        assert await status(admin, b"Bearer ") == 401
        assert await status(admin + b", " + developer) == 401
        assert await status(b"Basic YWRtaW46YWRtaW4=", developer) == 403
        assert await status(developer, developer) == 403
        assert await status(admin, admin) == 200


@pytest.mark.parametrize("name", ["key", "api_key", "api-key", "access_token", "authorization"])
async def test_a_key_in_the_address_is_none(
    secured: Secured, contract: Contract, name: str
) -> None:
    """It would be in the logs of everything on the way."""
    key = secured.keys[Role.ADMIN]
    async with secured.client(contract, None) as client:
        assert (await client.get(MODELS, params={name: key})).status_code == 401
        assert (await client.get(f"{MODELS}/{key}")).status_code == 401


# Sockets


@pytest.mark.parametrize(
    "way", ["no key", "a wrong key", "a key in the address", "a subprotocol", "a cookie"]
)
async def test_a_socket_without_a_key_in_a_header(secured: Secured, way: str) -> None:
    key = secured.keys[Role.ADMIN]
    ways: Mapping[str, Mapping[str, Any]] = {
        "no key": {},
        "a wrong key": {"headers": {"authorization": f"Bearer {key[:-4]}0000"}},
        "a key in the address": {"query": f"api_key={key}&token={key}".encode()},
        "a subprotocol": {
            "headers": {"sec-websocket-protocol": f"bearer, {key}"},
            "subprotocols": ("bearer", key),
        },
        "a cookie": {"headers": {"cookie": f"authorization=Bearer {key}"}},
    }
    async with Dial(create_app(secured.world.services()), SOCKET, **ways[way]) as socket:
        assert not socket.opened
        assert socket.code == 1008
    assert secured.world.generator.requests == []


async def test_a_socket_does_not_outlive_its_key(secured: Secured) -> None:
    key = secured.keys[Role.DEVELOPER]
    headers = {"authorization": f"Bearer {key}"}
    async with Dial(create_app(secured.world.services()), SOCKET, headers) as socket:
        question = {"type": "infer", "id": "a", "model": "smollm2", "prompt": "Hi"}
        await socket.say(question)
        while (told := await socket.hear())["event"] == "token":
            pass
        assert told["event"] == "done"
        await secured.directory.revoke(secured.ids[Role.DEVELOPER], by="me")
        secured.clock.now += FRESH_S + 0.01
        await socket.say(question)
        told = await socket.hear()
        assert told["event"] == "error"
        assert told["data"]["error"]["code"] == "UNAUTHORIZED"
    assert len(secured.world.generator.requests) == 1


# Rights that grow


async def limited(secured: Secured, *scopes: Scope) -> dict[str, str]:
    _, minted = await secured.directory.issue(
        "acme", role=Role.ADMIN, scopes=frozenset(scopes), by="me"
    )
    return {"authorization": f"Bearer {minted.text}"}


async def test_a_limited_key_makes_no_unlimited_one(secured: Secured, contract: Contract) -> None:
    headers = await limited(secured, Scope.TENANTS_WRITE, Scope.TENANTS_READ)
    async with secured.client(contract, None) as client:
        client.headers.update(headers)

        async def issue(**body: Any) -> httpx.Response:
            return await client.post(f"{TENANTS}/acme/keys", json=body)

        for body in ({"role": "admin"}, {}, {"role": "auditor"}):
            answer = await issue(**body)
            assert answer.status_code == 403, body
            assert "does not have" in answer.json()["error"]["message"]
        allowed = await issue(role="admin", scopes=["tenants:read"])
        assert allowed.status_code == 200
        # Nor by way of a key that is there: its successor would be in the caller's hands.
        rotated = await client.post(f"/admin/v1/keys/{secured.ids[Role.ADMIN]}/rotate", json={})
        assert rotated.status_code == 403
        own = await client.post(f"/admin/v1/keys/{allowed.json()['data']['id']}/rotate", json={})
        assert own.status_code == 200
    keys = {key.id: key for key in await secured.directory.keys("acme")}
    assert keys[secured.ids[Role.ADMIN]].expires is None, "nothing has happened to it"


# What the time of a refusal tells


class Asked:
    """The statements that a database was asked, without what they carried."""

    def __init__(self, secured: Secured) -> None:
        self.statements: list[str] = []
        database = secured.directory.database
        assert isinstance(database, Database)
        sa.event.listen(database.engine.sync_engine, "before_cursor_execute", self._note)

    def _note(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        self.statements.append(statement)

    def taken(self) -> Sequence[str]:
        statements, self.statements = self.statements, []
        return statements


class Compared:
    """How often, and how much of what, was compared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, int]] = []
        genuine = hmac.compare_digest

        def counting(one: Any, other: Any) -> bool:
            self.calls.append((len(one), len(other)))
            return genuine(one, other)

        monkeypatch.setattr(keys_module.hmac, "compare_digest", counting)

    def taken(self) -> Sequence[tuple[int, int]]:
        calls, self.calls = self.calls, []
        return calls


async def test_a_refusal_takes_the_same_work_whatever_is_wrong(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    peppers = Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests,an older one of these"})
    directory: Directory = secured.directory
    keys = KeyAuthenticator(directory, peppers, clock=secured.clock)
    _, expired = await directory.issue("acme", lifetime=timedelta(seconds=-1), by="me")
    good = secured.keys[Role.DEVELOPER]
    compared, asked = Compared(monkeypatch), Asked(secured)
    await keys.principal(good)
    expected = compared.taken()
    assert expected == [(64, 64)] * 2  # with each of the secrets, also when the first has fit
    looked_up = asked.taken()
    assert len([said for said in looked_up if said.startswith("SELECT")]) == 1
    secured.clock.now += FRESH_S + 0.01  # nothing is remembered of any
    for bad in (
        f"fr_{'0' * 12}_{good[16:]}",  # nobody's
        f"{good[:16]}{'0' * 40}",  # somebody's, with another secret
        good[:-1] + ("0" if good[-1] != "0" else "1"),  # nearly right
        expired.text,
    ):
        for remembered in (False, True):
            with pytest.raises(Unauthorized):
                await keys.principal(bad)
            assert compared.taken() == expected
            assert asked.taken() == ([] if remembered else looked_up)
        secured.clock.now += FRESH_S + 0.01


SECRET = ("digest", "secret", "pepper", "signature", "candidate")


@pytest.mark.parametrize("module", [keys_module, signature], ids=lambda module: module.__name__)
def test_secrets_are_compared_in_constant_time(module: Any) -> None:
    """By ``hmac.compare_digest``, and never by an operator that stops at the first difference."""
    source = Path(module.__file__).read_text()
    assert "hmac.compare_digest" in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], ast.Is | ast.IsNot):
            text = ast.unparse(node).lower()
            # How many there are is no secret.
            assert not any(word in text for word in SECRET) or "len" in text, text
