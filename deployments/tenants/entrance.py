"""Which credentials a gateway takes, as its configuration and the environment say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deployments.config import AuthConfig
from deployments.tenants.directory import Directory
from deployments.tenants.identity import Authenticator, KeyAuthenticator
from deployments.tenants.keys import Peppers, looks_like_key
from deployments.tenants.principal import Principal
from deployments.tenants.visibility import Visibility, WithSight
from models.errors import ConfigError

VARIABLE = "FRONTIER_AUTH"


def needs_keys(config: AuthConfig, environ: Mapping[str, str] = os.environ) -> bool:
    """Raises ConfigError: ``FRONTIER_AUTH`` is neither ``open`` nor ``keys``."""
    mode = config.mode or environ.get(VARIABLE) or "open"
    if mode not in ("open", "keys"):
        raise ConfigError(f"{VARIABLE} is {mode!r}; expected open or keys")
    return mode == "keys"


def authenticator(
    config: AuthConfig,
    directory: Directory,
    peppers: Peppers,
    *,
    environ: Mapping[str, str] = os.environ,
    clock: Callable[[], float] = time.monotonic,
) -> Authenticator | None:
    """``None``: the platform is open. Raises ConfigError as ``needs_keys`` does."""
    if not needs_keys(config, environ):
        return None
    visibility = Visibility(directory.database)
    keys = KeyAuthenticator(directory, peppers, clock=clock)
    if config.oidc is None:
        return WithSight(keys, visibility, clock=clock)
    from deployments.tenants.oidc import OidcAuthenticator

    tokens = OidcAuthenticator(config.oidc, directory, clock=clock)
    return WithSight(Either(keys, tokens), visibility, clock=clock)


@dataclass(frozen=True, slots=True)
class Either:
    """Keys by their look, and all else as tokens of the issuer."""

    keys: Authenticator
    tokens: Authenticator

    async def principal(self, credential: str) -> Principal:
        """See ``Authenticator``."""
        chosen = self.keys if looks_like_key(credential) else self.tokens
        return await chosen.principal(credential)
