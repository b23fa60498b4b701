"""Rows of training data: read, recognised, checked one by one.

======================== =====================================================
``messages``             a conversation, as OpenAI's fine-tuning takes it; an answer
                         with ``"weight": 0`` is context only
``prompt, completion``   text that goes on
``text``                 a document; a ``.txt`` file is one
``prompt, chosen,        a preference, as text or as messages
rejected``
======================== =====================================================

A bad row is named by file and line (Parquet: row), and skipped or the end of the run.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import ConfigError

Format: TypeAlias = Literal["chat", "completion", "text", "preference"]


class BadRow(ValueError):
    """Why a row cannot be trained on."""


@dataclass(frozen=True, slots=True)
class Skipped:
    where: str
    why: str


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # data sets carry columns of their own


class Message(_Part):
    model_config = ConfigDict(frozen=True, extra="forbid")  # a tool call must not vanish

    role: str = Field(min_length=1)
    content: str
    name: str | None = None
    weight: Literal[0, 1] = 1

    @property
    def trained(self) -> bool:
        return self.role == "assistant" and self.weight == 1


Conversation: TypeAlias = tuple[Message, ...]


class Chat(_Part):
    messages: Conversation = Field(min_length=2)

    @model_validator(mode="after")
    def _has_an_answer(self) -> Self:
        if self.messages[0].role == "assistant":
            raise ValueError("the first message is the assistant's; expected a user's or system's")
        if not any(message.trained for message in self.messages):
            raise ValueError("no message of the assistant to learn from")
        return self


class Completion(_Part):
    prompt: str
    completion: str = Field(min_length=1)


class Text(_Part):
    text: str = Field(min_length=1)


class Preference(_Part):
    prompt: str | Conversation
    chosen: str | Conversation
    rejected: str | Conversation

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if len({isinstance(part, str) for part in (self.prompt, self.chosen, self.rejected)}) > 1:
            raise ValueError("prompt, chosen and rejected are either all text or all messages")
        if not (self.chosen and self.rejected):
            raise ValueError("chosen or rejected is empty")
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same")
        return self


Row: TypeAlias = Chat | Completion | Text | Preference
KINDS: dict[Format, type[Row]] = {
    "chat": Chat,
    "preference": Preference,
    "completion": Completion,
    "text": Text,
}


@dataclass(frozen=True, slots=True)
class Origin:
    """A row and where it stands."""

    row: Row
    where: str


def read(
    sources: str | Sequence[str],
    format: Format | Literal["auto"] = "auto",
    *,
    on_bad_row: Literal["fail", "skip"] = "fail",
) -> tuple[list[Origin], list[Skipped]]:
    """All good rows of files, folders or patterns, in order, and those left out.

    Raises:
        ConfigError: nothing to read, another format, or a bad row under ``fail``.
    """
    rows: list[Origin] = []
    skipped: list[Skipped] = []
    for path in _files([sources] if isinstance(sources, str) else sources):
        for where, raw in _raw(path):
            try:
                rows.append(Origin(parse(raw, format), where))
            except BadRow as error:
                refuse(where, str(error), skipped, on_bad_row)
    if not rows:
        raise ConfigError(
            f"{sources} has no rows to train on"
            + (f"; {len(skipped)} were bad, the first: {_line(skipped[0])}" if skipped else "")
        )
    kinds = {type(origin.row).__name__ for origin in rows}
    if len(kinds) > 1:
        raise ConfigError(
            f"{sources} mixes rows of {' and '.join(sorted(kinds))}; set data.format or split them"
        )
    return rows, skipped


def refuse(
    where: str, why: str, skipped: list[Skipped], on_bad_row: Literal["fail", "skip"]
) -> None:
    """Note a bad row, or raise it."""
    bad = Skipped(where, why)
    if on_bad_row == "fail":
        raise ConfigError(f"{_line(bad)}; correct it, or set data.on_bad_row: skip")
    skipped.append(bad)


def parse(raw: object, format: Format | Literal["auto"] = "auto") -> Row:
    """Raises BadRow: what was found, and what was expected."""
    if isinstance(raw, ValueError):
        raise BadRow(f"not JSON ({raw})")
    if not isinstance(raw, dict):
        raise BadRow(f"a JSON {type(raw).__name__}, expected an object")
    kind = KINDS[format] if format != "auto" else _recognise(raw)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadRow(f"{place}: {first['msg']}" if place else first["msg"]) from None


def _recognise(raw: dict[str, Any]) -> type[Row]:
    for kind in KINDS.values():
        if kind.model_fields.keys() <= raw.keys():
            return kind
    expected = " or ".join("+".join(kind.model_fields) for kind in KINDS.values())
    raise BadRow(f"has keys {', '.join(map(str, raw)) or '(none)'}; expected {expected}")


def _files(sources: Iterable[str]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix in READERS)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not found:
            raise ConfigError(
                f"data: {source} is no file, folder or pattern with files of"
                f" {', '.join(READERS)}; relative paths start at the current folder"
            )
        files += found
    for file in files:
        if file.suffix not in READERS:
            raise ConfigError(f"data: {file} is not one of {', '.join(READERS)}")
    return files


def _raw(path: Path) -> Iterator[tuple[str, object]]:
    yield from READERS[path.suffix](path)


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row: object
            try:
                row = json.loads(line)
            except ValueError as error:  # bad UTF-8, too
                row = error
            yield f"{path}:{number}", row


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", _without_nulls(row)
    except ArrowInvalid as error:
        raise ConfigError(f"{path} is not a readable Parquet file: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Parquet gives every message every field that any message has."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _text(path: Path) -> Iterator[tuple[str, object]]:
    try:
        yield f"{path}:1", {"text": path.read_text(encoding="utf-8")}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error


READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}


def _line(bad: Skipped) -> str:
    return f"{bad.where}: {bad.why}"
