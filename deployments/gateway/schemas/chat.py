"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from deployments.gateway.schemas.base import Answer, NotSupported, Strict, by_shape, shape
from deployments.gateway.schemas.openai import GenerateFields, HarmlessFields, UsageAnswer
from deployments.gateway.schemas.sampling import MAX_GRAMMAR
from deployments.gateway.schemas.tools import (
    AnsweredCall,
    CallInMessage,
    CallPiece,
    NamedTool,
    ToolChoice,
    Tools,
    allowed,
)
from models.contracts import ChatMessage, Conversation, Grammar, Sampling
from models.errors import InvalidInput


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content: TypeAlias = Annotated[
    Annotated[str, shape("text")] | Annotated[list[TextPart], shape("list"), Field(min_length=1)],
    by_shape("a string or a list of text parts"),
]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[CallInMessage] | None = Field(
        default=None, min_length=1, max_length=128, description="Of an assistant."
    )
    tool_call_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        validate_default=True,
        description="Of role `tool`: the call whose result this is.",
    )
    content: Content | None = Field(
        default=None,
        validate_default=True,
        description="Text parts are joined by line breaks. Only calls can do without.",
    )
    name: NotSupported = Field(default=None, description="participants have no names yet")
    function_call: NotSupported = Field(default=None, description="use `tool_calls`")
    refusal: NotSupported = Field(default=None, description="models here do not refuse apart")
    audio: NotSupported = Field(default=None, description="text is the only modality")

    @field_validator("tool_calls")
    @classmethod
    def _of_an_assistant(
        cls, calls: list[CallInMessage] | None, info: ValidationInfo
    ) -> list[CallInMessage] | None:
        role = info.data.get("role", "assistant")
        if calls is not None and role != "assistant":
            raise PydanticCustomError("shape", f"Input should be left out of role {role!r}")
        return calls

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_result(cls, call: str | None, info: ValidationInfo) -> str | None:
        if (role := info.data.get("role")) is None or (role == "tool") == (call is not None):
            return call
        if call is None:
            raise PydanticCustomError("missing", "Field required")
        raise PydanticCustomError("shape", f"Input should be left out of role {role!r}")

    @field_validator("content")
    @classmethod
    def _something(cls, content: Content | None, info: ValidationInfo) -> Content | None:
        if content is None and not info.data.get("tool_calls"):
            raise PydanticCustomError("missing", "Field required")
        return content

    def as_contract(self) -> ChatMessage:
        text = self.content or ""
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        # Chat templates know OpenAI's "developer" by its older name.
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(
            role=role,
            content=text,
            tool_calls=tuple([call.as_contract() for call in self.tool_calls or ()]),
            tool_call_id=self.tool_call_id,
        )


class ChatRequest(GenerateFields, HarmlessFields):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    modalities: list[Literal["text"]] | None = Field(default=None, max_length=1)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = Field(
        default=None, description="`auto`, unless it says otherwise; `none`: no tool is shown."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="False: at most one call in an answer."
    )
    functions: NotSupported = Field(default=None, description="use `tools`")
    function_call: NotSupported = Field(default=None, description="use `tool_choice`")
    audio: NotSupported = Field(default=None, description="text is the only modality")
    prediction: NotSupported = Field(default=None, description="there is no predicted output")
    reasoning_effort: NotSupported = Field(default=None, description="models here do not reason")
    verbosity: NotSupported = Field(default=None, description="models here have no such control")
    web_search_options: NotSupported = Field(default=None, description="there is no web search")

    @property
    def may_call(self) -> bool:
        """Whether an answer can have tool calls."""
        return self.tools is not None and self.tool_choice != "none"

    @property
    def conversation(self) -> Conversation:
        tools = self.tools if self.may_call else None
        return Conversation(
            messages=tuple([message.as_contract() for message in self.messages]),
            tools=tuple([tool.as_contract() for tool in tools or ()]),
        )

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

    def grammar(self) -> Grammar | None:
        """Raises :class:`InvalidInput`, also for a choice of tools that there are not."""
        choice = self.tool_choice or "auto"
        if self.tools is None and choice not in ("auto", "none"):
            raise InvalidInput(
                "tool_choice asks for a tool, and there are no tools.", param="tool_choice"
            )
        form = super().grammar()
        if self.tools is None or choice == "none":
            return form
        if self.structured_outputs is not None:
            raise InvalidInput(
                "structured_outputs and tools both say what the answer has to be; give one.",
                param="structured_outputs",
            )
        names = [tool.function.name for tool in self.tools]
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise InvalidInput(
                f"tool_choice names {choice.function.name!r}; the tools are {', '.join(names)}.",
                param="tool_choice",
            )
        found = allowed(
            self.tools,
            choice,
            parallel=self.parallel_tool_calls is not False,
            answer=self.json_schema,
        ).as_grammar()
        if len(found.text) > MAX_GRAMMAR:
            raise InvalidInput(
                f"The schemas have {len(found.text)} characters; at most {MAX_GRAMMAR} are read.",
                param="tools",
            )
        return found


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
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


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
    tool_calls: list[CallPiece] | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(Answer):
    """One ``data:`` line of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None
