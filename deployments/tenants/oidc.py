"""Bearer tokens of an OpenID Connect issuer, checked against its published keys.

Only asymmetric algorithms are believed, whatever a token's header says; issuer, audience and
expiry must be right; a tenant and a role stand in claims whose names are configured.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from math import inf
from typing import Any

import httpx
import jwt

from deployments.config import OidcConfig
from deployments.tenants.directory import Directory, Tenant
from deployments.tenants.identity import Fresh, refuse_suspended
from deployments.tenants.principal import GRANTS, Principal, Role
from models.errors import NotFound, Unauthorized
from state.errors import StateUnavailable

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
KEYS_FRESH_S = 300.0
"""How long the issuer's keys are kept."""
ASK_AGAIN_S = 5.0
"""A token that names an unknown key makes us ask for the keys anew, but not more often."""
TIMEOUT_S = 3.0
KNOWN_WAIT_S = 0.3
"""For fresh keys, when the token's own is known and was not taken back so far."""
LONGEST_SUBJECT = 100
"""Characters, in rows that say who did something; one that is longer goes by its hash."""


class OidcAuthenticator:
    """See ``Authenticator``.

    Args:
        client: of HTTP, for tests; the issuer is asked directly, whatever proxies are set.
        clock: seconds, never running backwards.
    """

    def __init__(
        self,
        config: OidcConfig,
        directory: Directory,
        *,
        clock: Callable[[], float],
        client: httpx.AsyncClient | None = None,
    ) -> None:
        self._config = config
        self._directory = directory
        self._clock = clock
        self._client = client or httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False)
        self._tenants: Fresh[Tenant | None] = Fresh(self._tenant, clock=clock)
        self._keys: dict[str, jwt.PyJWK] = {}
        self._asked = -inf
        self._asking: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        """Of the last question."""

    async def principal(self, credential: str) -> Principal:
        claims = await self._claims(credential)
        name, role = self._claim(claims, self._config.tenant_claim), self._role(claims)
        tenant = await self._tenants.get(name)
        if tenant is None:
            raise Unauthorized(f"The token's tenant {name!r:.80} is not known here.")
        refuse_suspended(tenant)
        return Principal(
            tenant=tenant.name,
            subject=_subject(self._claim(claims, "sub")),
            role=role,
            scopes=GRANTS[role],
            plan=tenant.plan,
            overrides=tenant.overrides,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def _claims(self, credential: str) -> dict[str, Any]:
        """Raises Unauthorized, StateUnavailable."""
        try:
            header = jwt.get_unverified_header(credential)
        except (jwt.PyJWTError, RecursionError):  # JSON that is nested too deeply
            raise Unauthorized("The bearer token is neither an API key nor a JWT.") from None
        key = await self._key(header.get("kid"))
        try:
            claims: dict[str, Any] = jwt.decode(
                credential,
                key,
                algorithms=list(ALGORITHMS),
                audience=self._config.audience,
                issuer=self._config.issuer,
                leeway=self._config.clock_skew_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise Unauthorized(f"The bearer token is refused: {error}.") from None
        return claims

    def _claim(self, claims: dict[str, Any], name: str) -> str:
        value = claims.get(name)
        if not isinstance(value, str) or not value or not value.isprintable():
            raise Unauthorized(f"The bearer token has no text in its claim {name!r}.")
        return value

    def _role(self, claims: dict[str, Any]) -> Role:
        given = claims.get(self._config.role_claim, Role.DEVELOPER)
        try:
            return Role(given)
        except ValueError:
            raise Unauthorized(
                f"The bearer token's {self._config.role_claim} is {given!r:.80}; expected"
                f" {', '.join(Role)}."
            ) from None

    async def _key(self, id_: object) -> jwt.PyJWK:
        """Raises Unauthorized: the issuer has no such key; StateUnavailable: it is out of reach."""
        age = self._clock() - self._asked
        unknown = id_ not in self._keys
        if age >= KEYS_FRESH_S or (unknown and (age >= ASK_AGAIN_S or self._failure is not None)):
            # One question for all, and nobody's: whoever gives up waiting must not leave the
            # others with the keys of yesterday, which would refuse good tokens as forged.
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            # Where the key is known nobody waits for long: the issuer may have fallen silent.
            asking, patience_s = self._asking, None if unknown else KNOWN_WAIT_S
            await asyncio.wait([asking], timeout=patience_s)
            if asking.done():
                asking.result()
        found = self._keys.get(id_) if isinstance(id_, str) else None
        if found is None and self._failure is not None:
            raise StateUnavailable(
                f"the keys of {self._config.issuer} cannot be had: {self._failure!r:.200}"
            )
        if found is None:
            raise Unauthorized("The bearer token is signed by a key that its issuer does not have.")
        return found

    async def _ask(self) -> None:
        """Have the issuer's keys; if they cannot be had, those that are known are kept."""
        asked = self._clock()
        try:
            self._keys = await self._fetch()
        except (httpx.HTTPError, ValueError, KeyError, jwt.PyJWTError) as error:
            if self._failure is None:
                logger.warning("the keys of %s stay as they were: %r", self._config.issuer, error)
            self._failure = error
        else:
            self._failure = None
        self._asked = asked

    async def _fetch(self) -> dict[str, jwt.PyJWK]:
        """The issuer's keys by id; those of kinds we do not know are left out."""
        url = self._config.jwks_url or await self._discover()
        document = (await self._client.get(url)).raise_for_status().json()
        keys: dict[str, jwt.PyJWK] = {}
        for each in document["keys"]:
            try:
                key = jwt.PyJWK(each)
            except jwt.PyJWTError:
                continue
            if key.key_id and key.key_type != "oct":  # a secret shared by all is no signature
                keys[key.key_id] = key
        return keys

    async def _discover(self) -> str:
        where = f"{self._config.issuer.rstrip('/')}/.well-known/openid-configuration"
        url: str = (await self._client.get(where)).raise_for_status().json()["jwks_uri"]
        return url

    async def _tenant(self, name: str) -> Tenant | None:
        try:
            return await self._directory.tenant(name)
        except NotFound:
            return None


def _subject(claimed: str) -> str:
    if len(claimed) > LONGEST_SUBJECT:
        claimed = f"sha256:{hashlib.sha256(claimed.encode()).hexdigest()}"
    return f"oidc:{claimed}"
