"""What a tenant may see of the models. Pure.

A rule belongs to a public name, ``MODEL`` or ``MODEL:ADAPTER``, and names the tenants that may
see it; a name without a rule is everybody's. It holds for whatever the name means: all aliases
and versions of an adapter, so that neither a new version nor a moved alias opens or closes
anything. An adapter answers out of its model, so who may not see that sees neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from models.errors import ConfigError, InvalidInput
from models.versions import Reference, check_name

Rules: TypeAlias = Mapping[str, frozenset[str]]
"""The tenants that may see it, by public name."""


@dataclass(frozen=True, slots=True)
class Sight:
    rules: Rules = field(default_factory=dict)
    tenant: str = ""

    def sees(self, model: str, adapter: str | None = None) -> bool:
        """Whether the model is there for the tenant; and its adapter, as a request calls it."""
        if not self.rules:
            return True
        return self._may(model) and (
            adapter is None or self._may(f"{model}:{_without_version(adapter)}")
        )

    def _may(self, name: str) -> bool:
        tenants = self.rules.get(name)
        return tenants is None or self.tenant in tenants


EVERYTHING = Sight()
"""Of an open platform, and of who says what others may see."""


def _without_version(adapter: str) -> str:
    """The registry knows more ways to write a version than the one with ``@``."""
    try:
        return Reference.parse(adapter).name
    except ConfigError:
        return adapter  # there is none that is called so


def ruled(model: str, adapter: str | None) -> str:
    """The name that a rule is kept under. Raises InvalidInput: there can be no rule for it."""
    if adapter is None:
        return model
    try:
        return f"{model}:{check_name(adapter)}"
    except ConfigError:
        raise InvalidInput(
            f"{adapter!r:.120} is no name of an adapter. A rule holds for all of MODEL:NAME; a"
            " version that only some may see is published under a name of its own.",
            param="model",
        ) from None


def split(name: str) -> tuple[str, str | None]:
    """A public name as its model and its adapter, where nobody knows what is configured."""
    model, colon, adapter = name.partition(":")
    return model, adapter if colon else None
