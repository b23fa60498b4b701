"""For probes and scrapers: alive, ready, and the metrics of the whole cluster (spec A8)."""

from __future__ import annotations

from functools import partial

from starlette.responses import Response
from starlette.types import ASGIApp

from deployments.gateway.operation import Answers, Call, Operation
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.base import Nothing
from deployments.gateway.schemas.envelope import Liveness, Readiness, Success
from deployments.gateway.services import Services
from deployments.observability.exposition import OPEN_METRICS, TEXT
from deployments.tenants.principal import Scope as Right
from models.errors import Unavailable


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET",
            "/healthz",
            partial(healthz, services),
            answers=Answers(schema=Success[Liveness]),
            summary="Whether this process answers at all.",
            needs=None,
        ),
        Operation(
            "GET",
            "/readyz",
            partial(readyz, services),
            answers=Answers(schema=Success[Readiness], errors=(Unavailable,)),
            summary="Whether requests can be served: models loaded, state within reach.",
            needs=None,
        ),
        Operation(
            "GET",
            "/metrics",
            partial(metrics, services),
            answers=Answers(
                schema=None, media_type=TEXT, other=(OPEN_METRICS,), errors=(Unavailable,)
            ),
            summary="Prometheus metrics of the whole cluster; with `Accept: "
            "application/openmetrics-text`, and exemplars.",
            needs=Right.METRICS_READ,
        ),
    ]


async def healthz(services: Services, call: Call[Nothing]) -> ASGIApp:
    return enveloped(services, call.exchange, {"status": "alive"})


async def readyz(services: Services, call: Call[Nothing]) -> ASGIApp:
    components = await services.ready()
    missing = {name: state for name, state in components.items() if state is not True}
    if missing:
        reasons = "; ".join(
            f"{name}: {state or 'not ready'}" for name, state in sorted(missing.items())
        )
        raise Unavailable(f"Not ready. {reasons}.", details={"components": dict(components)})
    return enveloped(services, call.exchange, {"components": dict(components)})


async def metrics(services: Services, call: Call[Nothing]) -> ASGIApp:
    page = await services.metrics(call.headers.get("accept", ""))
    return Response(page.content, media_type=page.media_type, headers={"vary": "accept"})
