"""``GET /v1/models`` and ``GET /v1/models/{model}``."""

from __future__ import annotations

from typing import Literal

from deployments.gateway.schemas.base import Answer
from deployments.gateway.services import Task


class ModelAnswer(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: Task
    context: int | None


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelAnswer]
