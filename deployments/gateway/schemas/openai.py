"""What OpenAI's routes have in common. Names and meanings are OpenAI's, extensions ours."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deployments.gateway.schemas.base import (
    Answer,
    ModelName,
    Off,
    PriorityName,
    Strict,
)
from deployments.gateway.schemas.sampling import SamplingFields
from models.contracts import Priority
from models.errors import InvalidInput


class StreamOptions(Strict):
    include_usage: bool | None = Field(
        default=None, description="Send one more chunk, without choices, that carries the usage."
    )
    include_obfuscation: Off | None = None


class GenerateFields(SamplingFields):
    """A generating request in OpenAI's words, without its prompt."""

    model: ModelName
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: PriorityName | None = None
    user: str | None = Field(default=None, max_length=512, description="Accepted, not used.")

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def waiting_room(self) -> Priority:
        return self.priority or Priority.STANDARD

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with its usage.

        Raises:
            InvalidInput: ``stream_options`` without ``stream``.
        """
        if self.stream_options is None:
            return False
        if not self.stream:
            raise InvalidInput(
                "stream_options is only for a request with 'stream': true.", param="stream_options"
            )
        return bool(self.stream_options.include_usage)


class HarmlessFields(Strict):
    """Accepted, not used: nothing that a client reads back would differ."""

    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    store: Off | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)


class CachedTokens(Answer):
    cached_tokens: int


class UsageAnswer(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class OpenAIErrorBody(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorAnswer(Answer):
    error: OpenAIErrorBody
