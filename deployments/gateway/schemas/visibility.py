"""``/admin/v1/visibility`` and ``/admin/v1/models/{model}/visibility``."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from deployments.gateway.schemas.base import Answer, Strict, by_shape, shape

Listed: TypeAlias = Annotated[
    list[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]],
    Field(max_length=1000, description="These and nobody else; none: operators alone."),
]


class VisibilityRequest(Strict):
    tenants: Annotated[
        Annotated[Literal["all"], shape("text")] | Annotated[Listed, shape("list")],
        by_shape("'all' or a list of tenants"),
    ]


class VisibilityData(Answer):
    model: str = Field(description="What a request writes as its model.")
    tenants: Literal["all"] | list[str]


class VisibilityList(Answer):
    models: list[VisibilityData]
