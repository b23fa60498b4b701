"""The gateway, put together: which policies hold, in which order, and which routes there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeAlias

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from deployments.config import GatewayConfig
from deployments.gateway.openapi import openapi_operation
from deployments.gateway.operation import Operation
from deployments.gateway.policies import quota_headers
from deployments.gateway.policies.access import Access
from deployments.gateway.policies.authentication import Authentication
from deployments.gateway.policies.body_limit import BodyLimit
from deployments.gateway.policies.cache_control import CacheControl
from deployments.gateway.policies.compression import Compression
from deployments.gateway.policies.deadline import Deadline
from deployments.gateway.policies.deprecation import Deprecations, check_table, mark_deprecated
from deployments.gateway.policies.disconnect import Disconnect
from deployments.gateway.policies.failures import Failures
from deployments.gateway.policies.idempotency import Idempotency
from deployments.gateway.policies.loopback import Loopback
from deployments.gateway.policies.path_filter import PathFilter, may_be_answered, name_prefixes
from deployments.gateway.policies.quota_headers import QuotaHeaders
from deployments.gateway.policies.request_id import RequestId
from deployments.gateway.policies.security_headers import SecurityHeaders
from deployments.gateway.policies.slow_body import SlowBody
from deployments.gateway.policies.slow_reader import SlowReader
from deployments.gateway.routes import (
    admin_alerts,
    admin_models,
    admin_tenant_data,
    admin_tenants,
    admin_usage,
    admin_visibility,
    health,
    infer,
    infer_socket,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_models,
    predict,
    tokens,
    webhooks,
)
from deployments.gateway.services import Services
from models.errors import NotFound

Policy: TypeAlias = Callable[[ASGIApp], ASGIApp]


def create_app(services: Services) -> ASGIApp:
    operations = routes(services)
    app: ASGIApp = Router(
        [*operations, openapi_operation(operations), infer_socket.route(services)],
        default=unmatched,
        redirect_slashes=False,
        lifespan=partial(lifespan, services),
    )
    for policy in reversed(policies(services, operations)):
        app = policy(app)
    return app


@asynccontextmanager
async def lifespan(services: Services, _: object) -> AsyncIterator[None]:
    yield
    if services.close is not None:
        await services.close()


def routes(services: Services) -> list[Operation]:
    """The busiest first: they are tried in this order. Without those that are denied."""
    operations = [
        *openai_chat.operations(services),
        *infer.operations(services),
        *openai_completions.operations(services),
        *openai_embeddings.operations(services),
        *predict.operations(services),
        *tokens.operations(services),
        *health.operations(services),
        *openai_models.operations(services),
        *admin_models.operations(services),
        *admin_tenants.operations(services),
        *admin_tenant_data.operations(services),
        *admin_usage.operations(services),
        *admin_visibility.operations(services),
        *admin_alerts.operations(services),
        *webhooks.operations(services),
    ]
    paths, deprecations = services.config.paths, services.config.deprecations
    check_table(deprecations, operations)
    operations = [each for each in operations if may_be_answered(each.path_format, paths)]
    methods: defaultdict[str, set[str]] = defaultdict(set)
    for operation in operations:
        methods[operation.path] |= operation.allowed
    for operation in operations:
        operation.on_path = frozenset(methods[operation.path])
        mark_deprecated(deprecations, operation)
    return operations


def policies(services: Services, operations: Sequence[Operation]) -> Sequence[Policy]:
    """From the outermost, which sees a request first and its answer last, inwards."""
    config = services.config
    return [
        partial(RequestId, clock=services.clock, echoed=services.echoes_ids),
        SecurityHeaders,
        *cors(config.cors.allow_origins),
        partial(Access, emit=services.emit, clock=services.clock),
        QuotaHeaders,
        *([partial(Deprecations, table=config.deprecations)] if config.deprecations else []),
        partial(Failures, now=services.now),
        partial(PathFilter, paths=config.paths, names_below=name_prefixes(operations)),
        partial(Authentication, authenticator=services.authenticator),
        *([] if services.authenticator else [loopback(services)]),
        *([] if services.cache is None else [CacheControl]),
        partial(Compression, above_bytes=config.compress_above_bytes),
        Disconnect,
        partial(SlowReader, limit_s=config.send_timeout_s),
        partial(Deadline, limit_s=partial(limit_s, config)),
        partial(BodyLimit, max_bytes=config.max_body_bytes),
        partial(SlowBody, limit_s=config.body_timeout_s),
        *idempotency(services, operations),
    ]


def loopback(services: Services) -> Policy:
    origins = services.config.cors.allow_origins
    return partial(Loopback, bind_host=services.bind_host, origins=origins)


def idempotency(services: Services, operations: Sequence[Operation]) -> list[Policy]:
    """Inside authentication: a key is its tenant's. Inside compression: what is kept is plain, and
    goes out as the one who asks again takes it. Inside all that holds for each caller alone
    (hanging up, deadline, size), since one work may have several.
    """
    if services.idempotency is None:
        return []
    return [
        partial(
            Idempotency,
            records=services.idempotency,
            operation_at=partial(operation_at, operations),
            max_body_bytes=services.config.idempotency.max_body_bytes,
            now=services.now,
        )
    ]


def operation_at(operations: Sequence[Operation], scope: Scope) -> Operation | None:
    """What the router will choose."""
    return next((each for each in operations if each.matches(scope)[0] is Match.FULL), None)


def limit_s(config: GatewayConfig, path: str) -> float:
    """Fixed-cost models have a limit of their own."""
    fixed_cost = path == openai_embeddings.PATH or path.endswith("/predict")
    return config.predict_timeout_s if fixed_cost else config.request_timeout_s


def cors(origins: tuple[str, ...]) -> list[Policy]:
    if not origins:
        return []
    return [
        partial(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("*",),
            expose_headers=(
                "X-Request-ID",
                "Retry-After",
                "Server-Timing",
                "X-Cache",
                "X-Next-Cursor",
                "X-Prev-Cursor",
                "Idempotent-Replayed",
                "Deprecation",
                "Sunset",
                "Warning",
                "Link",
                *quota_headers.NAMES,
            ),
        )
    ]


async def unmatched(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose()(scope, receive, send)
        return
    raise NotFound(f"There is nothing at {scope['path']!r:.300}; see /openapi.json.")
