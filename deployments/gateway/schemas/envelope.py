"""The envelope of every answer that is not OpenAI's (spec A5)."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from deployments.gateway.schemas.base import Answer

Data = TypeVar("Data")


class ErrorBody(Answer):
    code: str
    message: str
    details: dict[str, Any]


class Success(Answer, Generic[Data]):
    success: Literal[True]
    data: Data
    error: None
    timestamp: str
    request_id: str


class Failure(Answer):
    success: Literal[False]
    data: None
    error: ErrorBody
    timestamp: str
    request_id: str


class Liveness(Answer):
    status: Literal["alive"]


class Readiness(Answer):
    components: dict[str, Literal[True]]
