"""Schemathesis over the OpenAPI document: no 5xx, nothing undocumented, whatever is sent."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from schemathesis.specs.openapi.schemas import OpenApiSchema
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.app import create_app, routes
from deployments.gateway.openapi import document
from tests.gateway.fakes import World


def described_and_served() -> OpenApiSchema:
    services = World().services()
    described = document(routes(services))
    # Names that exist, so that valid requests get as far as the workers.
    for name, schema in described["components"]["schemas"].items():
        if name.endswith("Request") and "model" in schema["properties"]:
            model = "minilm" if name.startswith("Embedding") else "smollm2"
            schema["properties"]["model"]["enum"] = [model]
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for parameter in operation["parameters"]:
                if parameter["name"] == "model":
                    model = "digits" if path.endswith("/predict") else "smollm2"
                    parameter["schema"]["enum"] = [model, "smollm2:poet"]
    loaded = schemathesis.openapi.from_dict(described)
    loaded.app = from_this_machine(create_app(services))
    return loaded


def from_this_machine(app: ASGIApp) -> ASGIApp:
    """So that admin routes answer."""

    async def local(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            others = [header for header in scope["headers"] if header[0] != b"host"]
            headers = [*others, (b"host", b"localhost")]
            scope = {**scope, "client": ("127.0.0.1", 1), "headers": headers}
        await app(scope, receive, send)

    return local


schema = described_and_served()


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=30, deadline=None)
def test_whatever_is_sent(case: Any) -> None:
    # A schema cannot say which cursors were given out, or which fields exclude one another.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
