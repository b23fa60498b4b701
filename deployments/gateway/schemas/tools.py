"""Functions that a chat model may ask its client to call, in OpenAI's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from deployments.gateway.schemas.base import Answer, Strict, by_shape, shape
from models import tool_calls
from models.contracts import Tool, ToolCall

MOST_TOOLS = 128
MAX_DESCRIPTION = 4096
MAX_ARGUMENTS = 65_536
"""Characters."""
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

Name: TypeAlias = Annotated[str, Field(pattern=rf"^{tool_calls.NAME}$")]


def _of_an_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("shape", "Input should be the schema of an object")
    return schema


def _an_object(arguments: str) -> str:
    try:
        if isinstance(json.loads(arguments), dict):
            return arguments
    except (ValueError, RecursionError):
        pass
    raise PydanticCustomError("shape", "Input should be a JSON object, as text")


class Function(Strict):
    name: Name
    description: str | None = Field(default=None, max_length=MAX_DESCRIPTION)
    parameters: Annotated[dict[str, Any], AfterValidator(_of_an_object)] | None = Field(
        default=None, description="A JSON schema; none: it takes no arguments."
    )
    strict: bool | None = Field(default=None, description="Arguments always keep to the schema.")

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return NO_ARGUMENTS if self.parameters is None else {"type": "object", **self.parameters}


class ToolDefinition(Strict):
    type: Literal["function"]
    function: Function

    def as_contract(self) -> Tool:
        function = self.function
        parameters = json.dumps(function.schema_of_arguments)
        return Tool(name=function.name, description=function.description, parameters=parameters)


def _told_apart(tools: list[ToolDefinition]) -> list[ToolDefinition]:
    names = [tool.function.name for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PydanticCustomError("shape", f"Input has more than one function {twice[0]!r}")
    return tools


Tools: TypeAlias = Annotated[
    list[ToolDefinition],
    Field(min_length=1, max_length=MOST_TOOLS),
    AfterValidator(_told_apart),
]


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], shape("text")]
    | Annotated[NamedTool, shape("object")],
    by_shape("'none', 'auto', 'required' or an object that names a function"),
]


class CalledFunction(Strict):
    name: Name
    arguments: Annotated[str, Field(max_length=MAX_ARGUMENTS), AfterValidator(_an_object)]


class CallInMessage(Strict):
    """What an assistant has asked for before, sent back to it."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"]
    function: CalledFunction

    def as_contract(self) -> ToolCall:
        return ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


def allowed(
    tools: Sequence[ToolDefinition],
    choice: Literal["auto", "required"] | NamedTool,
    *,
    parallel: bool,
    answer: dict[str, Any] | None,
) -> tool_calls.Allowed:
    """What an answer may be, where there are tools.

    Args:
        answer: the schema of one without calls, if it has to be JSON.
    """
    functions = [tool.function for tool in tools]
    if isinstance(choice, NamedTool):
        functions = [each for each in functions if each.name == choice.function.name]
        parallel = False
    return tool_calls.Allowed(
        tools={each.name: each.schema_of_arguments for each in functions},
        required=choice != "auto",
        parallel=parallel,
        answer=answer,
    )


class AnsweredFunction(Answer):
    name: str
    arguments: str


class AnsweredCall(Answer):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class FunctionPiece(Answer):
    name: str | None = None
    arguments: str


class CallPiece(Answer):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionPiece
