"""``/v1/infer``: our own words for one prompt and one answer; unary, streamed, and on a socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, RootModel

from deployments.gateway.schemas.base import Answer, ModelName, PriorityName, Strict
from deployments.gateway.schemas.envelope import Failure
from deployments.gateway.schemas.sampling import SamplingFields
from models.contracts import ChatMessage, Conversation, Priority, Prompt


class InferParams(SamplingFields):
    raw: bool | None = Field(
        default=None,
        description="True: continue the prompt as it stands, without the chat template.",
    )


OTHER_NAMES = {"messages": "prompt"} | {
    name: f"params.{name}" for name in SamplingFields.model_fields
}


class InferRequest(Strict):
    model: ModelName
    prompt: str = Field(
        min_length=1,
        description="One user message, rendered by the model's chat template unless `params.raw`.",
    )
    params: InferParams = InferParams()
    priority: PriorityName = Priority.STANDARD

    @property
    def as_prompt(self) -> Prompt:
        if self.params.raw:
            return self.prompt
        return Conversation((ChatMessage(role="user", content=self.prompt),))

    @property
    def other_names(self) -> Mapping[str, str]:
        return OTHER_NAMES


CallId: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]


class SocketInfer(InferRequest):
    type: Literal["infer"]
    id: CallId = Field(description="Chosen by the client; every event of this request carries it.")


class SocketCancel(Strict):
    type: Literal["cancel"]
    id: CallId


class InferUsage(Answer):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class InferTimings(Answer):
    """Where the time went inside the engine."""

    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    total_ms: float


class InferSummary(Answer):
    """The closing event of a stream."""

    id: str
    model: str
    usage: InferUsage
    latency_ms: float
    finish_reason: Literal["stop", "length"]
    timings: InferTimings | None


class InferData(InferSummary):
    output: str


class TokenText(Answer):
    text: str


class TokenEvent(Answer):
    event: Literal["token"]
    data: TokenText


class DoneEvent(Answer):
    event: Literal["done"]
    data: InferSummary


class ErrorEvent(Answer):
    event: Literal["error"]
    data: Failure


class KeepAlive(Answer):
    event: Literal["keep-alive"]
    data: None


class QueuePlace(Answer):
    """Where the request stands, if it asked for that."""

    position: int
    waiting: int
    wait_s: float | None


class QueueEvent(Answer):
    event: Literal["queue"]
    data: QueuePlace


class InferEvent(RootModel[TokenEvent | DoneEvent | ErrorEvent | KeepAlive | QueueEvent]):
    """One event of a stream: an SSE event's name and data, or one line of NDJSON."""
