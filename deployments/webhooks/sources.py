"""Who may deliver webhooks: named sources, each with secrets and a tenant of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from deployments.config import WebhooksConfig
from deployments.tenants.secrets import Current, of_variable, referred
from models.errors import ConfigError, NotFound

DEFAULT = "default"
VARIABLE = "FRONTIER_WEBHOOK_SECRETS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    name: str
    tenant: str
    """Whose events these are."""
    secrets: Current = field(repr=False)


@dataclass(frozen=True, slots=True)
class Sources:
    """By name. Without any, no webhook is taken."""

    _by_name: Mapping[str, Source] = field(default_factory=dict)

    @classmethod
    def of(cls, config: WebhooksConfig, environ: Mapping[str, str] = os.environ) -> Self:
        """Those of the configuration, and ``default`` with ``FRONTIER_WEBHOOK_SECRETS``.

        Raises:
            ConfigError: a source that is configured has no secrets.
        """
        found = {}
        for name, source in config.sources.items():
            try:
                secrets = referred(source.secrets, environ)
            except ConfigError as error:
                raise ConfigError(f"gateway.webhooks.sources.{name}: {error.message}") from None
            found[name] = Source(name=name, tenant=source.tenant, secrets=secrets)
        if DEFAULT not in found and (given := of_variable(VARIABLE, environ)) is not None:
            found[DEFAULT] = Source(name=DEFAULT, tenant=config.tenant, secrets=lambda: given)
        return cls(found)

    def find(self, name: str) -> Source:
        """Raises NotFound: there is none of that name here."""
        if (source := self._by_name.get(name)) is not None:
            return source
        if name == DEFAULT:
            raise NotFound(
                f"No webhooks are taken here: the source {DEFAULT!r} has no secrets. Name another"
                f" source in X-Webhook-Source, or have {VARIABLE} set by who runs this platform."
            )
        raise NotFound(
            f"There is no source {name!r:.80} here; X-Webhook-Source names one of"
            " gateway.webhooks.sources."
        )
