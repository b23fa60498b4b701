"""``GET /v1/models`` and ``GET /v1/models/{model}``."""

from __future__ import annotations

from typing import Literal

from deployments.gateway.schemas.base import Answer


class ModelAnswer(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: Literal["generate", "embed"]
    context: int | None


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelAnswer]
