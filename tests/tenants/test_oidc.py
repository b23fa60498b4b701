"""Tokens of a real issuer on a real socket: keys, rotation, and everything that may be forged."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from deployments.config import OidcConfig
from deployments.tenants import oidc
from deployments.tenants.directory import Directory
from deployments.tenants.oidc import OidcAuthenticator
from deployments.tenants.principal import GRANTS, Role
from models.errors import Forbidden, Unauthorized
from state import tables
from state.errors import StateUnavailable
from state.patience import REQUEST_S


class Issuer:
    """Publishes its keys over HTTP, and signs whatever it is asked to."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.asked = 0
        self.broken = False
        self.speaks = threading.Event()
        """Until it does, nobody gets an answer."""
        self.speaks.set()
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += self.path == "/keys"
                issuer.speaks.wait()
                self.send_response(500 if issuer.broken else 200)
                self.end_headers()
                self.wfile.write(json.dumps(issuer.document(self.path)).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        """One with a key."""
        made = cls()
        made.rsa("one")
        yield made
        made.server.shutdown()
        made.server.server_close()

    def document(self, path: str) -> Any:
        if path != "/keys":
            return {"jwks_uri": f"{self.url}/keys"}
        public = []
        for name, key in self.keys.items():
            kind = jwt.algorithms.ECAlgorithm if _is_curve(key) else jwt.algorithms.RSAAlgorithm
            public.append({**kind.to_jwk(key.public_key(), as_dict=True), "kid": name})
        return {"keys": [*public, {"kty": "oct", "k": "c2VjcmV0", "kid": "shared"}]}

    def rsa(self, name: str) -> None:
        self.keys[name] = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def token(self, key: str = "one", algorithm: str = "RS256", **claims: Any) -> str:
        told = {
            "iss": self.url,
            "aud": "frontier-run",
            "sub": "alice",
            "exp": time.time() + 60,
            "tenant": "acme",
            **claims,
        }
        told = {name: value for name, value in told.items() if value is not None}
        return jwt.encode(told, self.keys[key], algorithm=algorithm, headers={"kid": key})


def _is_curve(key: Any) -> bool:
    return isinstance(key, ec.EllipticCurvePrivateKey)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer.running() as issuer:
        yield issuer


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def tokens(directory: Directory, issuer: Issuer, clock: Clock) -> Any:
    await directory.create("acme", plan="pro", by="me")
    issuer.broken, issuer.asked = False, 0
    config = OidcConfig(issuer=issuer.url, audience="frontier-run", clock_skew_s=10)
    made = OidcAuthenticator(config, directory, clock=clock)
    yield made
    await made.close()


async def test_a_token_is_a_principal(tokens: OidcAuthenticator, issuer: Issuer) -> None:
    principal = await tokens.principal(issuer.token())
    assert (principal.tenant, principal.subject) == ("acme", "oidc:alice")
    assert (principal.role, principal.plan) == (Role.DEVELOPER, "pro")
    auditor = await tokens.principal(issuer.token(role="auditor"))
    assert auditor.scopes == GRANTS[Role.AUDITOR]
    assert issuer.asked == 1, "its keys are kept"


async def test_who_is_called_at_length_fits_the_audit_log(
    tokens: OidcAuthenticator, issuer: Issuer
) -> None:
    """An issuer may use 255 characters (OpenID Connect Core, 2), and some use more."""
    given = ["a" * 300, "a" * 301, "a" * oidc.LONGEST_SUBJECT]
    names = [(await tokens.principal(issuer.token(sub=sub))).subject for sub in given]
    assert len(set(names)) == 3
    assert max(map(len, names)) <= tables.audit.c.who.type.length
    assert names[-1] == f"oidc:{given[-1]}"


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"aud": "another"}, "Audience"),
        ({"iss": "http://elsewhere"}, "issuer"),
        ({"exp": time.time() - 3600}, "expired"),
        ({"exp": None}, "exp"),
        ({"sub": None}, "sub"),
        ({"nbf": time.time() + 3600}, "not yet valid"),
        ({"tenant": None}, "no text in its claim 'tenant'"),
        ({"tenant": 5}, "no text in its claim 'tenant'"),
        ({"tenant": "acme\0"}, "no text in its claim 'tenant'"),
        ({"sub": "\ud800"}, "no text in its claim 'sub'"),
        ({"tenant": "nobody"}, "tenant 'nobody' is not known"),
        ({"role": "root"}, "role is 'root'"),
    ],
)
async def test_claims_that_are_wrong(
    tokens: OidcAuthenticator, issuer: Issuer, claims: dict[str, Any], why: str
) -> None:
    with pytest.raises(Unauthorized, match=why):
        await tokens.principal(issuer.token(**claims))


@pytest.mark.parametrize("claim", ["exp", "nbf", "iat"])
async def test_clocks_may_differ_a_little_and_no_more(
    tokens: OidcAuthenticator, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, claim: str
) -> None:
    """A second inside the ten that are configured, and a second beyond them."""
    now = int(time.time())

    class Still(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(now, tz)

    monkeypatch.setattr("jwt.api_jwt.datetime", Still)
    ahead = -1 if claim == "exp" else 1
    told = {"exp": now + 600} | {claim: now + ahead * 9}
    await tokens.principal(issuer.token(**told))
    told[claim] = now + ahead * 11
    with pytest.raises(Unauthorized):
        await tokens.principal(issuer.token(**told))


async def test_what_is_not_signed_by_the_issuer(tokens: OidcAuthenticator, issuer: Issuer) -> None:
    told = {"iss": issuer.url, "aud": "frontier-run", "sub": "eve", "tenant": "acme"}
    told["exp"] = time.time() + 60  # type: ignore[assignment]
    public = issuer.keys["one"].public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    good = issuer.token()
    body = jwt.utils.base64url_encode(json.dumps(told).encode()).decode()
    confused = jwt.utils.base64url_encode(b'{"alg":"HS256","kid":"one","typ":"JWT"}').decode()
    signature = jwt.utils.base64url_encode(
        __import__("hmac").digest(pem, f"{confused}.{body}".encode(), "sha256")
    ).decode()
    forged = [
        jwt.encode(told, None, algorithm="none", headers={"kid": "one"}),
        jwt.encode(told, "secret" * 8, algorithm="HS256", headers={"kid": "shared"}),
        f"{confused}.{body}.{signature}",  # HMAC with the public key as its secret
        jwt.encode(told, stranger, algorithm="RS256", headers={"kid": "one"}),
        jwt.encode(told, stranger, algorithm="RS256", headers={"kid": "unknown"}),
        jwt.encode(told, stranger, algorithm="RS256"),
        f"{good.rsplit('.', 1)[0]}.",
        f"{good.split('.')[0]}.{body}.{good.split('.')[2]}",
        "not.a.token",
        "nothing",
    ]
    for token in forged:
        with pytest.raises(Unauthorized):
            await tokens.principal(token)


async def test_a_suspended_tenant(
    tokens: OidcAuthenticator, issuer: Issuer, directory: Directory
) -> None:
    await directory.change("acme", suspended=True, by="me")
    with pytest.raises(Forbidden, match="suspended"):
        await tokens.principal(issuer.token())


async def test_keys_are_rotated(tokens: OidcAuthenticator, issuer: Issuer, clock: Clock) -> None:
    await tokens.principal(issuer.token())
    issuer.keys["two"] = ec.generate_private_key(ec.SECP256R1())
    new = issuer.token("two", "ES256")
    with pytest.raises(Unauthorized, match="does not have"):
        await tokens.principal(new)  # asked a moment ago, and not for every stranger again
    clock.now += oidc.ASK_AGAIN_S
    assert (await tokens.principal(new)).subject == "oidc:alice"
    assert issuer.asked == 2
    del issuer.keys["two"]
    clock.now += oidc.KEYS_FRESH_S
    with pytest.raises(Unauthorized, match="does not have"):
        await tokens.principal(new)


async def test_an_issuer_that_is_out_of_reach(
    tokens: OidcAuthenticator, issuer: Issuer, clock: Clock
) -> None:
    issuer.broken = True
    with pytest.raises(StateUnavailable, match="cannot be had"):
        await tokens.principal(issuer.token())
    issuer.broken = False
    await tokens.principal(issuer.token())
    issuer.broken = True
    clock.now += oidc.KEYS_FRESH_S
    await tokens.principal(issuer.token())  # keys that were right stay so for a while


async def test_an_issuer_that_has_fallen_silent(
    tokens: OidcAuthenticator, issuer: Issuer, clock: Clock
) -> None:
    await tokens.principal(issuer.token())
    clock.now += oidc.KEYS_FRESH_S
    issuer.speaks.clear()
    try:
        async with asyncio.timeout(REQUEST_S):  # so long a request waits for all of the state
            assert (await tokens.principal(issuer.token())).subject == "oidc:alice"
    finally:
        issuer.speaks.set()


async def test_who_gives_up_waiting_does_not_leave_others_without_keys(
    tokens: OidcAuthenticator, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow issuer is no reason to call a good token forged."""
    fetch, go = OidcAuthenticator._fetch, asyncio.Event()

    async def slow(self: OidcAuthenticator) -> dict[str, jwt.PyJWK]:
        await go.wait()
        return await fetch(self)

    monkeypatch.setattr(OidcAuthenticator, "_fetch", slow)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await tokens.principal(issuer.token())
    go.set()
    assert (await tokens.principal(issuer.token())).subject == "oidc:alice"
    assert issuer.asked == 1, "one question for all"
