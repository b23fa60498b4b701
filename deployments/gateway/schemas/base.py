"""The rules all schemas share: nothing unknown, nothing coerced, nothing ambiguous."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)

from models.contracts import Priority


class Strict(BaseModel):
    """Unknown fields are errors, and ``"0.5"`` is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @property
    def other_names(self) -> Mapping[str, str]:
        """What this client calls fields of the contract (``models/contracts.py``), where that is
        not their own name: an error has to name what it has written.
        """
        return {}


class Nothing(Strict):
    """The input of a route that takes none."""


class Answer(BaseModel):
    """A response as documented. Responses are built as plain dicts; the tests hold them to this."""

    model_config = ConfigDict(extra="forbid")


def shape(name: str) -> Tag:
    """Mark one branch of a union that :func:`by_shape` chooses from.

    Pydantic puts the mark into the path of an error; the brackets tell
    ``validation.py`` that it is no part of what the client wrote.
    """
    return Tag(f"<{name}>")


def by_shape(expected: str) -> Discriminator:
    """Choose a branch by the JSON type, so that an error speaks of that branch alone.

    Branches: ``text``, ``list``, ``object``, as far as the union has them.
    """
    names: dict[type, str] = {str: "<text>", list: "<list>", dict: "<object>"}

    def choose(value: object) -> str | None:
        return names.get(type(value))

    return Discriminator(
        choose, custom_error_type="shape", custom_error_message=f"Input should be {expected}"
    )


def by_type(*names: str) -> Discriminator:
    """Choose a branch by the field ``type`` of an object, as ``by_shape`` does by the JSON type."""

    def choose(value: object) -> str | None:
        kind = value.get("type") if isinstance(value, dict) else None
        return f"<{kind}>" if kind in names else None

    *others, last = (repr(name) for name in names)
    return Discriminator(
        choose,
        custom_error_type="shape",
        custom_error_message=f"Input should have a type of {', '.join(others)} or {last}",
    )


def _off(value: bool) -> bool:
    if value:
        raise ValueError("should be false")
    return value


Off: TypeAlias = Annotated[
    bool, AfterValidator(_off), WithJsonSchema({"type": "boolean", "const": False})
]
"""``Literal[False]`` would take 0 for False."""
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
ModelName: TypeAlias = Annotated[
    str, Field(min_length=1, max_length=256, description="One of the names in `GET /v1/models`.")
]
PriorityName: TypeAlias = Annotated[
    Priority, Field(description="Which waiting room the request joins.")
]
NotSupported: TypeAlias = None
"""A field of OpenAI's that would change the answer and is not built: only null passes."""
