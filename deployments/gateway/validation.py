"""From what a client sent to a schema's value, or to an error that says what would be right."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from models.errors import InvalidInput

Schema = TypeVar("Schema", bound=BaseModel)

MISTAKES_TOLD = 10
MISTAKES_COUNTED = 1000
"""From here on nobody reads them, and describing each would hold up everybody else."""
LONGEST_TOLD = 256
"""Characters of a field's name that come back to who sent it."""
LONGEST_TYPO = 64
"""Characters of a field's name in which a known one may have been meant."""
SEARCHED = 262_144
"""Bytes of a body that is no JSON in which the field at fault is looked for."""
LONE = re.compile("[\ud800-\udfff]")
PYDANTIC_SUBJECT = re.compile(r"^(Value error, |Input |List |String |Dictionary )+should")


def parse_json(schema: type[Schema], raw: bytes | str) -> Schema:
    """Raises :class:`InvalidInput` naming the place, the value and what was expected."""
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise _unreadable(raw, error) or _refusal(schema, error) from None


def parse_query(schema: type[Schema], query: bytes) -> Schema:
    """Raises :class:`InvalidInput` naming the parameter, the value and what was expected."""
    if not query:
        given: Mapping[str, str] = {}
    else:
        try:
            pairs = parse_qsl(
                query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100
            )
        except ValueError:
            raise InvalidInput("The query string is not URL-encoded UTF-8.") from None
        given = dict(pairs)
        if len(given) < len(pairs):
            raise InvalidInput("A query parameter is given twice; give each once.")
    try:
        return schema.model_validate_strings(given)
    except ValidationError as error:
        raise _refusal(schema, error) from None


def _unreadable(raw: bytes | str, error: ValidationError) -> InvalidInput | None:
    """The field that is no text, if that is all that keeps a body from being JSON: its bytes are no
    UTF-8, or it escapes half of a character.
    """
    if error.error_count() > 1:  # then it is JSON, and to describe them all costs much
        return None
    [issue] = error.errors(include_url=False)
    if issue["type"] != "json_invalid" or isinstance(raw, str) or len(raw) > SEARCHED:
        return None
    try:
        body = json.loads(raw.decode("utf-8", "surrogateescape"))
        where = next(_not_text(body, ()), None)
    except (ValueError, RecursionError):
        return None
    if where is None:
        return None
    field = _dotted(where)
    problem = f"{field or 'The body'} is no valid text: {issue['ctx']['error']}."
    return InvalidInput(problem, param=field or None)


def _not_text(value: object, path: tuple[int | str, ...]) -> Iterator[tuple[int | str, ...]]:
    """Paths of strings that have no UTF-8; of the object, if it is the name of a field."""
    if isinstance(value, str):
        if LONE.search(value):
            yield path
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_text(item, (*path, index))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _not_text(name, path)
            yield from _not_text(item, (*path, name))


def _refusal(schema: type[BaseModel], error: ValidationError) -> InvalidInput:
    if (count := error.error_count()) > MISTAKES_COUNTED:
        return InvalidInput(
            f"The request has {count} mistakes, too many to tell; /openapi.json says what is right."
        )
    issues = error.errors(include_url=False)
    mistakes = [_explain(schema, issue) for issue in issues[:MISTAKES_TOLD]]
    param, message = mistakes[0]
    details: dict[str, object] = {}
    if len(issues) > 1:
        message = f"{message.rstrip('.')}; and {len(issues) - 1} more."
        details["mistakes"] = [text for _, text in mistakes]
    return InvalidInput(message, param=param or None, details=details)


def _explain(schema: type[BaseModel], issue: ErrorDetails) -> tuple[str, str]:
    """The field as the client wrote it, and one sentence."""
    *parents, last = issue["loc"] or ("",)
    kind = issue["type"]
    path = [part for part in parents if not _is_mark(part)]
    if kind == "extra_forbidden" or not _is_mark(last):
        path.append(last)
    where = _dotted(path)
    if kind == "json_invalid":
        return "", f"The body is not valid JSON: {issue['ctx']['error']}."
    if kind == "extra_forbidden":
        known = sorted(_model_at(schema, path[:-1]).model_fields)
        name = str(path[-1])
        close = difflib.get_close_matches(name, known, n=1) if len(name) <= LONGEST_TYPO else ()
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known) or '-'}."
        return where, f"Unknown field {where!r:.300}; {hint}"
    if kind == "missing":
        return where, f"{where} is required."
    if kind == "none_required":
        field = _model_at(schema, path[:-1]).model_fields[str(path[-1])]
        return where, f"{where} is not supported: {field.description}. Leave it out."
    expected = PYDANTIC_SUBJECT.sub("should", issue["msg"])
    return where, f"{where or 'The body'} {expected} (given: {issue['input']!r:.80})."


def _is_mark(part: int | str) -> bool:
    """Whether pydantic put it there: a branch of ``schemas.base.shape``, or ``[key]``."""
    return isinstance(part, str) and part[:1] + part[-1:] in ("<>", "[]")


def _dotted(path: Sequence[int | str]) -> str:
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part:.{LONGEST_TOLD}}" for part in path
    ).removeprefix(".")


def _model_at(schema: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """The schema of the object that ``path`` leads to."""
    for part in path:
        if isinstance(part, str):
            schema = next(_models_in(schema.model_fields[part].annotation))
    return schema


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
