"""``/admin/v1/models/{model}/adapters``."""

from __future__ import annotations

from pydantic import Field

from deployments.gateway.schemas.base import Answer, Strict


class AdapterRequest(Strict):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="What follows the colon in a request's model.",
    )
    source: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="`registry:NAME@VERSION_OR_ALIAS`, or a sealed artifact's folder, which is"
        " registered first. Default: the newest version of `name` in the registry.",
    )


class AdapterData(Answer):
    id: str = Field(description="What a request writes as its model.")
    model: str
    name: str
    alias: str
    version: str = Field(description="NAME@VERSION in the registry.")
    content_sha256: str
    created: int = Field(description="Unix seconds.")


class AdapterList(Answer):
    adapters: list[AdapterData]


class Withdrawn(Answer):
    model: str
    name: str
