"""Bearer tokens that bring their own truth: where to get the key, which key, how to read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from jwt.utils import base64url_encode

from deployments.tenants.oidc import OidcAuthenticator
from models.errors import Unauthorized
from tests.databases import postgres, postgres_url
from tests.tenants.conftest import directory, peppers
from tests.tenants.test_oidc import Issuer, clock, issuer, tokens

__all__ = ["clock", "directory", "issuer", "peppers", "postgres", "postgres_url", "tokens"]


@pytest.fixture
def database_url(tmp_path: Any) -> str:
    """What is attacked here has nothing to do with the database."""
    return f"sqlite:///{tmp_path / 'frontier.db'}"


@pytest.fixture(scope="module")
def mallory() -> Iterator[Issuer]:
    """Who signs, and would serve the keys for it."""
    with Issuer.running() as issuer:
        yield issuer


def signed(mallory: Issuer, issuer: Issuer, header: dict[str, Any]) -> str:
    """What the platform would believe, were it not for the key."""
    claims = {"iss": issuer.url, "aud": "frontier-run", "sub": "eve", "tenant": "acme"}
    claims |= {"exp": 4_000_000_000, "role": "admin"}  # type: ignore[dict-item]
    return jwt.encode(claims, mallory.keys["one"], algorithm="RS256", headers=header)


async def test_a_token_does_not_say_where_its_key_is(
    tokens: OidcAuthenticator, issuer: Issuer, mallory: Issuer
) -> None:
    own = jwt.algorithms.RSAAlgorithm.to_jwk(mallory.keys["one"].public_key(), as_dict=True)
    for header in (
        {"kid": "one", "jku": f"{mallory.url}/keys"},
        {"kid": "new", "jku": f"{mallory.url}/keys"},
        {"kid": "one", "x5u": f"{mallory.url}/keys"},
        {"kid": f"{mallory.url}/keys"},
        {"kid": "../../../../dev/null"},
        {"kid": "one", "jwk": own},
        {"kid": "one", "x5c": ["MIIB"]},
        {"kid": "' OR '1'='1"},
    ):
        with pytest.raises(Unauthorized):
            await tokens.principal(signed(mallory, issuer, header))
    assert mallory.asked == 0


def unsigned(header: bytes, body: bytes = b"{}") -> str:
    return ".".join(base64url_encode(part).decode() for part in (header, body, b"x"))


DEEP = 12_000
"""As much as fits into the head of a request."""


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"null",
        b"[]",
        b"1" * DEEP,
        b"[" * DEEP,
        b'{"a":' * (DEEP // 5),
        b'{"alg":"RS256","kid":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"alg":"RS256","kid":["one"]}',
        b'{"alg":"RS256","kid":{"one":1}}',
        b'{"alg":"RS256","kid":1e400}',
        b'{"alg":["RS256"],"kid":"one"}',
        b'{"alg":"RS256","kid":"one","b64":false,"crit":["b64"]}',
        b'{"alg":"RS256","kid":"\\ud800"}',
        b'{"alg":"none","kid":"one"}',
        b'{"alg":"RS256","alg":"none","kid":"one"}',
        b"\xff\xfe",
    ],
)
async def test_a_head_that_is_made_to_hurt_is_a_token_of_nobody(
    tokens: OidcAuthenticator, header: bytes
) -> None:
    with pytest.raises(Unauthorized):
        await tokens.principal(unsigned(header))


async def test_a_body_that_is_made_to_hurt_is_not_read_before_it_is_genuine(
    tokens: OidcAuthenticator, issuer: Issuer
) -> None:
    head = json.dumps({"alg": "RS256", "kid": "one"}).encode()
    for body in (b"[" * DEEP, b'{"exp":1e400}', b"\xff"):
        with pytest.raises(Unauthorized):
            await tokens.principal(unsigned(head, body))


@pytest.mark.parametrize("exp", [float("inf"), "soon", [1], {}])
async def test_even_its_own_issuer_cannot_make_it_fail(
    tokens: OidcAuthenticator, issuer: Issuer, exp: Any
) -> None:
    with pytest.raises(Unauthorized):
        await tokens.principal(issuer.token(exp=exp))
