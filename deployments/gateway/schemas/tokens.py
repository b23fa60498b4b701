"""``POST /tokenize`` and ``POST /detokenize``, in vLLM's words."""

from __future__ import annotations

from pydantic import Field

from deployments.gateway.schemas.base import Answer, ModelName, Strict, TokenId
from deployments.gateway.schemas.chat import Message
from deployments.gateway.schemas.completions import PromptText
from models.contracts import Conversation, Prompt
from models.errors import InvalidInput


class TokenizeRequest(Strict):
    model: ModelName
    prompt: PromptText | None = Field(default=None, description="As of `/v1/completions`.")
    messages: list[Message] | None = Field(
        default=None,
        min_length=1,
        description="As of `/v1/chat/completions`: the model's chat template is applied.",
    )

    @property
    def asked(self) -> Prompt:
        """Raises :class:`InvalidInput` unless there is exactly one of the two."""
        if (self.prompt is None) == (self.messages is None):
            given = "neither" if self.prompt is None else "both"
            raise InvalidInput(
                f"Send either prompt or messages; {given} came.",
                param="prompt" if self.prompt is None else "messages",
            )
        if self.prompt is not None:
            return self.prompt
        assert self.messages is not None
        return Conversation(tuple([message.as_contract() for message in self.messages]))


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int | None
    tokens: list[int]


class DetokenizeRequest(Strict):
    model: ModelName
    tokens: list[TokenId] = Field(min_length=1)


class DetokenizeAnswer(Answer):
    prompt: str
