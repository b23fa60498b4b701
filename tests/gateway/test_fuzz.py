"""Schemathesis over the OpenAPI document: no 5xx, nothing undocumented, whatever is sent."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from schemathesis.specs.openapi.schemas import OpenApiSchema

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
    loaded = schemathesis.openapi.from_dict(described)
    loaded.app = create_app(services)
    return loaded


schema = described_and_served()


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=30, deadline=None)
def test_whatever_is_sent(case: Any) -> None:
    # A schema cannot say which cursors were given out, or which fields exclude one another.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
