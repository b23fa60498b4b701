"""How a client says what is drawn: the fields that all generating routes share."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from deployments.gateway.schemas.base import Strict, TokenId, by_shape, by_type, shape
from models.contracts import Grammar, GrammarKind, Sampling
from models.errors import InvalidInput

MAX_GRAMMAR = 65_536
"""Characters."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}

StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=512)]
Stop: TypeAlias = Annotated[
    Annotated[StopText, shape("text")]
    | Annotated[list[StopText], shape("list"), Field(max_length=4)],
    by_shape("a string or a list of at most 4 strings"),
]
Choice: TypeAlias = Annotated[str, Field(min_length=1, max_length=1024)]
Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Accepted, not used.")
    description: str | None = Field(default=None, max_length=4096, description="Not used.")
    definition: dict[str, Any] = Field(alias="schema", description="A JSON schema.")
    strict: bool | None = Field(default=None, description="Answers always keep to the schema.")


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat: TypeAlias = Annotated[
    Annotated[TextFormat, shape("text")]
    | Annotated[JsonObjectFormat, shape("json_object")]
    | Annotated[JsonSchemaFormat, shape("json_schema")],
    by_type("text", "json_object", "json_schema"),
]


class StructuredOutputs(Strict):
    """As vLLM has it. Exactly one; for JSON there is ``response_format``."""

    regex: str | None = Field(default=None, min_length=1, max_length=MAX_GRAMMAR)
    choice: list[Choice] | None = Field(default=None, min_length=1, max_length=1024)
    grammar: str | None = Field(
        default=None, min_length=1, max_length=MAX_GRAMMAR, description="In Lark's language."
    )

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(each is not None for each in (self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("should have exactly one of regex, choice and grammar")
        return self

    @property
    def as_grammar(self) -> Grammar:
        if self.regex is not None:
            return Grammar(GrammarKind.REGEX, self.regex)
        if self.grammar is not None:
            return Grammar(GrammarKind.LARK, self.grammar)
        words = " | ".join(json.dumps(word) for word in self.choice or ())
        return Grammar(GrammarKind.LARK, f"start: {words}")


class SamplingFields(Strict):
    """Null means the model's default, which its entry in the configuration may set."""

    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31, description="0: no limit.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Bias] | None = Field(default=None, max_length=1024)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=64)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = Field(
        default=None, description="JSON of any kind, or by a schema."
    )
    structured_outputs: StructuredOutputs | None = None

    PASSED_ON: ClassVar[frozenset[str]] = frozenset(
        {
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "seed",
            "ignore_eos",
        }
    )
    """Fields that mean the same, under the same name, in ``Sampling``."""

    def sampling(self, defaults: Sampling, **overrides: object) -> Sampling:
        """The contract's form.

        Args:
            defaults: the model's, for what the client leaves open.
            overrides: fields that the protocol words differently.

        Raises:
            InvalidInput: the answer is to have two forms, or a schema is too long.
        """
        given: dict[str, Any] = {
            name: value
            for name in self.model_fields_set & self.PASSED_ON
            if (value := getattr(self, name)) is not None
        }
        if self.stop:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        if (grammar := self.grammar()) is not None:
            given["grammar"] = grammar
        return replace(defaults, **{**given, **overrides})

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """What an answer has to be valid for, if it has to be JSON."""
        form = self.response_format
        if isinstance(form, JsonObjectFormat):
            return ANY_OBJECT
        return form.json_schema.definition if isinstance(form, JsonSchemaFormat) else None

    def grammar(self) -> Grammar | None:
        """Raises :class:`InvalidInput` as :meth:`sampling`."""
        schema, other = self.json_schema, self.structured_outputs
        if schema is None:
            return None if other is None else other.as_grammar
        if other is not None:
            raise InvalidInput(
                "response_format and structured_outputs both say what the answer has to be;"
                " give one.",
                param="structured_outputs",
            )
        text = json.dumps(schema)
        if len(text) > MAX_GRAMMAR:
            raise InvalidInput(
                f"The schema has {len(text)} characters; at most {MAX_GRAMMAR} are read.",
                param="response_format",
            )
        return Grammar(GrammarKind.JSON_SCHEMA, text)
