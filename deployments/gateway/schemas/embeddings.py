"""``POST /v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from deployments.gateway.schemas.base import (
    Answer,
    ModelName,
    PriorityName,
    Strict,
    by_shape,
    shape,
)

Text: TypeAlias = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(Strict):
    model: ModelName
    input: Annotated[
        Annotated[Text, shape("text")]
        | Annotated[list[Text], shape("list"), Field(min_length=1, max_length=2048)],
        by_shape("a string or a list of strings; token arrays are not supported"),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(
        default=None, ge=1, description="Only the model's own: vectors are never cut."
    )
    priority: PriorityName | None = None
    user: str | None = Field(default=None, max_length=512, description="Accepted, not used.")

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Answer):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
