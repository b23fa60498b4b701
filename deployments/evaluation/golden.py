r"""A golden set: JSON Lines, each with what to ask and what would be right.

.. code:: json

    {"prompt": "What is the capital of France?", "expected": "Paris", "match": "contains"}
    {"prompt": "2 + 2 =", "expected": "\\\\b4\\\\b", "match": "regex"}
    {"messages": [{"role": "user", "content": "Red or blue?"}], "expected": "blue"}
    {"input": [0.0, 5.0, 13.0], "expected": {"label": 3}}

Text is compared after lower-casing and without punctuation, articles left in. What a
predictor says is compared as JSON: of an object only the keys that are expected, numbers
within ``within``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.contracts import Json
from models.errors import ConfigError


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Item(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    id: str = Field(default="", max_length=200)
    """Unique in the file; default: the number of its line."""
    prompt: str | None = Field(default=None, min_length=1)
    """One message of a user."""
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1)
    """A conversation."""
    input: Any = None
    """Of a model that predicts."""
    expected: Any
    match: Literal["exact", "contains", "regex", "f1"] = "contains"
    """``f1``: the share of words in common (SQuAD's), from 0 to 1; the others are 0 or 1."""
    within: float = Field(default=1e-6, ge=0)
    """How far a predicted number may be from the expected one."""

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        given = {"prompt", "messages", "input"} & self.model_fields_set
        if len(given) != 1:
            raise ValueError(f"one of prompt, messages and input is needed, given {len(given)}")
        if "input" in given:
            if "match" in self.model_fields_set:
                raise ValueError("match is for text; a predictor's output is compared as JSON")
            return self
        if not isinstance(self.expected, str) or not self.expected:
            raise ValueError("expected must be a text")
        if self.match == "regex":
            try:
                re.compile(self.expected)
            except re.error as error:
                raise ValueError(f"expected is no regular expression: {error}") from None
        elif not words(self.expected):
            raise ValueError("expected has no letter and no digit")
        return self

    @property
    def predicts(self) -> bool:
        return "input" in self.model_fields_set

    @property
    def conversation(self) -> list[dict[str, str]]:
        if self.messages is not None:
            return [message.model_dump() for message in self.messages]
        return [{"role": "user", "content": self.prompt or ""}]

    def score(self, answer: Json) -> float:
        """Quality in [0, 1]; 1 is right."""
        if self.predicts:
            return float(agrees(self.expected, answer, self.within))
        text = answer if isinstance(answer, str) else json.dumps(answer)
        if self.match == "regex":
            return float(re.search(self.expected, text) is not None)
        if self.match == "f1":
            return f1(self.expected, text)
        wanted, found = words(self.expected), words(text)
        if self.match == "exact":
            return float(wanted == found)
        return float(any(found[at : at + len(wanted)] == wanted for at in range(len(found))))


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenSet:
    items: Mapping[str, Item]
    sha256: str
    """Of the file: scores on different sets are not compared."""

    @property
    def predicts(self) -> bool:
        return any(item.predicts for item in self.items.values())

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises ConfigError naming the file and the line."""
        try:
            raw = file.read_bytes()
            text = raw.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from None
        items: dict[str, Item] = {}
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                item = Item.model_validate_json(line)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = "".join(f"{part}: " for part in first["loc"])
                said = first["msg"].removeprefix("Value error, ")
                raise ConfigError(f"{file}, line {number}: {where}{said}") from None
            id_ = item.id or str(number)
            if id_ in items:
                raise ConfigError(f"{file}, line {number}: the id {id_!r} was used before")
            items[id_] = item
        if not items:
            raise ConfigError(f"{file} has no items; expected one JSON object a line")
        if len({item.predicts for item in items.values()}) > 1:
            raise ConfigError(f"{file} mixes prompts with inputs; one model takes one of them")
        return cls(items=items, sha256=hashlib.sha256(raw).hexdigest())


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits of any script, whatever form they are written in."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def f1(expected: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words (Rajpurkar et al. 2016)."""
    wanted, found = Counter(words(expected)), Counter(words(answer))
    common = (wanted & found).total()
    if not common:
        return 0.0
    return 2 * common / (wanted.total() + found.total())


def agrees(expected: Json, answer: Json, within: float) -> bool:
    """Whether ``answer`` holds all that is expected."""
    return all(_leaves_agree(*pair, within) for pair in _leaves(expected, answer))


_ABSENT = object()


def _leaves(expected: Any, answer: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(expected, dict) and isinstance(answer, dict):
        for key, value in expected.items():
            yield from _leaves(value, answer.get(key, _ABSENT))
    elif isinstance(expected, list) and isinstance(answer, list) and len(expected) == len(answer):
        for left, right in zip(expected, answer, strict=True):
            yield from _leaves(left, right)
    else:
        yield expected, answer


def _leaves_agree(expected: Any, answer: Any, within: float) -> bool:
    numbers = all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in (expected, answer)
    )
    if numbers:
        return math.isclose(expected, answer, rel_tol=0.0, abs_tol=within)
    return type(expected) is type(answer) and bool(expected == answer)
