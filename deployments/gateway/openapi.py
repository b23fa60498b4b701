"""The OpenAPI 3.1 document, made of the very schemas that validate (spec A6)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, TypeAlias

import orjson
from pydantic import TypeAdapter
from starlette.responses import Response
from starlette.types import ASGIApp

from deployments.gateway.errors import speaks_openai
from deployments.gateway.operation import (
    ACCESS_ERRORS,
    ANY_ERRORS,
    BODY_ERRORS,
    Answers,
    Call,
    Operation,
    Repeat,
)
from deployments.gateway.schemas.base import Nothing
from deployments.gateway.schemas.envelope import Failure
from deployments.gateway.schemas.openai import OpenAIErrorAnswer
from deployments.tenants.idempotency import HEADER as IDEMPOTENCY_HEADER
from deployments.webhooks.signature import EXPECTED, HEADER
from models.errors import Conflict, PlatformError, Unauthorized

API_VERSION = "1.0.0"
JSON = "application/json"
REQUEST_ID = {
    "name": "X-Request-ID",
    "in": "header",
    "description": "Taken as the request's id if it has 1 to 128 plain characters.",
    "schema": {"type": "string"},
}
IDEMPOTENCY_KEY = {
    "name": IDEMPOTENCY_HEADER,
    "in": "header",
    "description": "Sent again with the same key, the same request is not carried out again: it"
    " joins the one at work, or gets its answer. 429, 5xx and broken streams are not kept.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}
REPLAYED = "`true`: the answer to an earlier request with this `Idempotency-Key`."
KEY = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key, or a token of the configured issuer. None where the platform is"
    " open, which it is on a loopback address only.",
}
SIGNATURE = {
    "type": "apiKey",
    "in": "header",
    "name": HEADER,
    "description": f"`{EXPECTED}`: HMAC-SHA256, under the source's secret, of that time, a dot and"
    " the body as it is sent. Several `v1` may be given.",
}
DEPRECATION = {
    "Deprecation": "Since when what was asked for is deprecated, or will be (RFC 9745).",
    "Sunset": "When it goes, where that is known (RFC 8594).",
    "Warning": "The same in words.",
    "Link": "Its successor, if it has one.",
}
RETRY_LATER = frozenset({429, 503})

Schema: TypeAlias = dict[str, Any]
Schemas: TypeAlias = Mapping[object, Schema]
"""By the type that was described: its schema, which refers to the components."""


def openapi_operation(operations: Sequence[Operation]) -> Operation:
    """``GET /openapi.json``, about ``operations`` and itself."""

    @cache
    def body() -> bytes:
        return orjson.dumps(document([*operations, own]))

    async def show(call: Call[Nothing]) -> ASGIApp:
        return Response(body(), media_type=JSON)

    own = Operation(
        "GET",
        "/openapi.json",
        show,
        answers=Answers(schema=dict[str, Any]),
        summary="This document.",
        needs=None,
    )
    return own


def document(operations: Sequence[Operation]) -> Schema:
    schemas, components = _describe(operations)
    paths: defaultdict[str, Schema] = defaultdict(dict)
    for operation in operations:
        paths[operation.path_format][operation.method.lower()] = _operation(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Frontier Run", "version": API_VERSION},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": KEY, "signature": SIGNATURE},
        },
    }


def _describe(operations: Sequence[Operation]) -> tuple[Schemas, Schema]:
    written = dict.fromkeys(operation.takes for operation in operations)
    read = dict.fromkeys(
        described for operation in operations for described in _answer_types(operation.answers)
    )
    found, definitions = TypeAdapter.json_schemas(
        [
            *((type_, "validation", TypeAdapter(type_)) for type_ in written),
            *((type_, "serialization", TypeAdapter(type_)) for type_ in read),
        ],
        ref_template="#/components/schemas/{model}",
    )
    schemas = {type_: schema for (type_, _), schema in found.items()}
    return schemas, definitions.get("$defs", {})


def _answer_types(answers: Answers) -> Iterator[Any]:
    yield from (Failure, OpenAIErrorAnswer)
    yield from answers.streams.values()
    if answers.schema is not None:
        yield answers.schema


def _operation(operation: Operation, schemas: Schemas) -> Schema:
    described: Schema = {
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", operation.method.lower() + operation.path_format).strip(
            "_"
        ),
        "parameters": [REQUEST_ID, *_parameters(operation)],
        "responses": {"200": _success(operation, schemas), **_failures(operation, schemas)},
    }
    if operation.needs is not None:
        described["security"] = [{"key": []}]
        described["description"] = f"Needs the scope `{operation.needs}`."
    if operation.verify is not None:
        described["security"] = [{"signature": []}]
        described["description"] = "Needs no API key: the body is signed."
    if operation.deprecated:
        described["deprecated"] = True
    if operation.has_body:
        schema = schemas[operation.takes]
        if operation.deprecated_fields:  # beside the reference: others may share the component
            marks = {name: {"deprecated": True} for name in sorted(operation.deprecated_fields)}
            schema = {**schema, "properties": marks}
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return described


def _takes_keys(operation: Operation) -> bool:
    """Whether it heeds an ``Idempotency-Key``."""
    return operation.method == "POST" and operation.repeat is not Repeat.LEFT_TO_ROUTE


def _parameters(operation: Operation) -> Iterator[Schema]:
    if _takes_keys(operation):
        yield IDEMPOTENCY_KEY
    for name in operation.param_convertors:
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name, meaning in operation.headers.items():
        yield {
            "name": name,
            "in": "header",
            "required": False,
            "description": meaning,
            "schema": {"type": "string"},
        }
    if operation.method == "GET":
        for name, schema in operation.takes.model_json_schema().get("properties", {}).items():
            parameter = {"name": name, "in": "query", "required": False, "schema": schema}
            if name in operation.deprecated_fields:
                parameter["deprecated"] = True
            yield parameter


def _success(operation: Operation, schemas: Schemas) -> Schema:
    answers = operation.answers
    content: Schema = {}
    if answers.schema is not None:
        content[answers.media_type] = {"schema": schemas[answers.schema]}
    elif not answers.streams:
        content[answers.media_type] = {"schema": {"type": "string"}}
    for media_type in answers.other:
        content[f"{media_type}; charset=utf-8"] = {"schema": {"type": "string"}}
    for media_type, event in answers.streams.items():
        # OpenAPI 3.1 cannot say "a sequence of": the event's schema stands beside.
        content[media_type] = {"x-event-schema": schemas[event]}
    headers = dict(answers.headers)
    if _takes_keys(operation):
        headers["Idempotent-Replayed"] = REPLAYED
    if operation.deprecated or operation.deprecated_fields:
        headers |= DEPRECATION
    return {
        "description": "Done.",
        "headers": {name: _header(meaning) for name, meaning in headers.items()},
        "content": content,
    }


def _failures(operation: Operation, schemas: Schemas) -> Schema:
    errors: set[type[PlatformError]] = {*ANY_ERRORS, *operation.answers.errors}
    if operation.needs is not None:
        errors.update(ACCESS_ERRORS)
    if operation.verify is not None:
        errors.add(Unauthorized)
    if operation.has_body:
        errors.update(BODY_ERRORS)
    if _takes_keys(operation):
        errors.add(Conflict)
    by_status: defaultdict[int, list[type[PlatformError]]] = defaultdict(list)
    for error in sorted(errors, key=lambda error: (error.status, error.code)):
        by_status[error.status].append(error)
    shape = OpenAIErrorAnswer if speaks_openai(operation.path) else Failure
    return {
        str(status): {
            "description": f"{HTTPStatus(status).phrase}. Codes: "
            + ", ".join(f"`{error.code}`" for error in errors),
            "headers": {"Retry-After": _header("Seconds to wait, where that is known.")}
            if status in RETRY_LATER
            else {},
            "content": {JSON: {"schema": schemas[shape]}},
        }
        for status, errors in by_status.items()
    }


def _header(description: str) -> Schema:
    return {"description": description, "schema": {"type": "string"}}
