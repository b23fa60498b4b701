"""``POST /v1/completions``: raw text in, its continuation out, no chat template."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, Field

from deployments.gateway.schemas.base import Answer, NotSupported, TokenId, shape
from deployments.gateway.schemas.openai import GenerateFields, UsageAnswer
from models.contracts import Prompt, Sampling
from models.errors import InvalidInput

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default on this route alone."""
MAX_PROMPTS = 128
MAX_CHOICES = 128

PromptText: TypeAlias = Annotated[str, Field(min_length=1)]
PromptTokens: TypeAlias = Annotated[list[TokenId], Field(min_length=1)]


def _shape_of_prompt(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    inner = {str: "<texts>", int: "<tokens>", list: "<token lists>"}
    return inner.get(type(value[0]))


PromptField: TypeAlias = Annotated[
    Annotated[PromptText, shape("text")]
    | Annotated[list[PromptText], shape("texts"), Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[PromptTokens, shape("tokens")]
    | Annotated[
        list[PromptTokens], shape("token lists"), Field(min_length=1, max_length=MAX_PROMPTS)
    ],
    Discriminator(
        _shape_of_prompt,
        custom_error_type="shape",
        custom_error_message="Input should be a string, a list of strings, a list of token ids,"
        " or a list of lists of token ids, and not empty",
    ),
]


class CompletionRequest(GenerateFields):
    prompt: PromptField
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CHOICES,
        description="So many are drawn, and the `n` likeliest a token are answered, best first.",
    )
    echo: bool | None = Field(
        default=None, description="Answer with the prompt before its continuation."
    )
    suffix: NotSupported = Field(default=None, description="models here cannot fill in")

    @property
    def drawn(self) -> int:
        """Continuations of each prompt, of which the best ``choices`` are answered.

        Raises:
            InvalidInput: fewer than are to be answered, or of a stream, which cannot choose.
        """
        if self.best_of is None or self.best_of == self.choices:
            return self.choices
        if self.best_of < self.choices:
            raise InvalidInput(
                f"best_of is {self.best_of}; it has to be at least n, which is {self.choices}.",
                param="best_of",
            )
        if self.stream:
            raise InvalidInput(
                "best_of chooses among whole answers; leave out either it or stream.",
                param="best_of",
            )
        return self.best_of

    @property
    def prompts(self) -> list[Prompt]:
        """One entry for each prompt of the batch.

        Raises:
            InvalidInput: for more choices than one answer may hold.
        """
        given = self.prompt
        prompts: list[Prompt]
        if isinstance(given, str):
            prompts = [given]
        elif isinstance(given[0], int):
            prompts = [tuple(given)]
        else:
            prompts = [p if isinstance(p, str) else tuple(p) for p in given]
        if len(prompts) * self.drawn > MAX_CHOICES:
            raise InvalidInput(
                f"{len(prompts)} prompts with {self.drawn} choices each are more than the"
                f" {MAX_CHOICES} choices of one answer; send fewer at a time.",
                param="n" if self.best_of is None else "best_of",
            )
        return prompts

    def as_sampling(self, defaults: Sampling) -> Sampling:
        return self.sampling(
            defaults,
            max_tokens=self.max_tokens or defaults.max_tokens or DEFAULT_MAX_TOKENS,
            logprobs=self.logprobs,
            prompt_logprobs=bool(self.echo) and self.logprobs is not None,
        )


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class CompletionChunkChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(Answer):
    """One ``data:`` line of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: UsageAnswer | None = None
