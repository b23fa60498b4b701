"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from deployments.gateway.schemas.base import Answer, NotSupported, Strict, by_shape, shape
from deployments.gateway.schemas.openai import GenerateFields, HarmlessFields, UsageAnswer
from models.contracts import ChatMessage, Sampling
from models.errors import InvalidInput


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content: TypeAlias = Annotated[
    Annotated[str, shape("text")] | Annotated[list[TextPart], shape("list"), Field(min_length=1)],
    by_shape("a string or a list of text parts"),
]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(description="Text parts are joined by line breaks.")
    name: NotSupported = Field(default=None, description="participants have no names yet")
    tool_calls: NotSupported = Field(default=None, description="tool calls come later")
    function_call: NotSupported = Field(default=None, description="tool calls come later")
    refusal: NotSupported = Field(default=None, description="models here do not refuse apart")
    audio: NotSupported = Field(default=None, description="text is the only modality")

    def as_contract(self) -> ChatMessage:
        text = self.content
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        # Chat templates know OpenAI's "developer" by its older name.
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role=role, content=text)


class ChatRequest(GenerateFields, HarmlessFields):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    modalities: list[Literal["text"]] | None = Field(default=None, max_length=1)
    tools: NotSupported = Field(default=None, description="tool calls come later")
    tool_choice: NotSupported = Field(default=None, description="tool calls come later")
    functions: NotSupported = Field(default=None, description="tool calls come later")
    function_call: NotSupported = Field(default=None, description="tool calls come later")
    audio: NotSupported = Field(default=None, description="text is the only modality")
    prediction: NotSupported = Field(default=None, description="there is no predicted output")
    reasoning_effort: NotSupported = Field(default=None, description="models here do not reason")
    verbosity: NotSupported = Field(default=None, description="models here have no such control")
    web_search_options: NotSupported = Field(default=None, description="there is no web search")

    @property
    def conversation(self) -> tuple[ChatMessage, ...]:
        return tuple([message.as_contract() for message in self.messages])

    @property
    def other_names(self) -> Mapping[str, str]:
        if self.max_completion_tokens is None:
            return {}
        return {"max_tokens": "max_completion_tokens"}

    def as_sampling(self, defaults: Sampling) -> Sampling:
        """The sampling fields, with OpenAI's two names for the length and two for logprobs.

        Raises:
            InvalidInput: for fields that contradict one another.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput(
                "top_logprobs is only for a request with 'logprobs': true.", param="top_logprobs"
            )
        length = self.max_completion_tokens
        if length is not None and self.max_tokens not in (None, length):
            raise InvalidInput(
                f"max_completion_tokens is {length} but max_tokens is {self.max_tokens}:"
                " they mean the same; give one.",
                param="max_completion_tokens",
            )
        return self.sampling(
            defaults,
            max_tokens=length or self.max_tokens or defaults.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class ChatTopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprob]


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(Answer):
    """One ``data:`` line of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None
