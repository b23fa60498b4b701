"""Letting a request in, and paying for it when it is over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.gateway.exchange import Exchange
from deployments.gateway.metering import used
from deployments.gateway.services import Services
from deployments.tenants.meter import Admission, QuotaExceeded, Work
from models.errors import PlatformError, Timeout


async def admit(services: Services, exchange: Exchange, work: Work) -> Admission | None:
    """Let a request in, and note where its tenant's limits stand. ``None``: nothing is counted.

    Raises:
        QuotaExceeded, StateUnavailable: it is not let in.
    """
    if services.meter is None or exchange.principal is None:
        return None
    try:
        async with exchange.patience.waiting("the counters"):
            admission = await services.meter.admit(exchange.principal, exchange.model, work)
    except QuotaExceeded as error:
        exchange.levels = error.levels
        raise
    exchange.levels = admission.levels
    return admission


async def extend(
    services: Services, exchange: Exchange, admission: Admission, prompt_tokens: int
) -> Admission:
    """Reserve so many more for the prompt. Raises as ``admit`` does."""
    assert services.meter is not None
    assert exchange.principal is not None
    try:
        async with exchange.patience.waiting("the counters"):
            extended = await services.meter.extend(exchange.principal, admission, prompt_tokens)
    except QuotaExceeded as error:
        exchange.levels = error.levels
        raise
    exchange.levels = extended.levels
    return extended


@asynccontextmanager
async def metered(services: Services, exchange: Exchange, work: Work) -> AsyncIterator[None]:
    """Around work whose answer comes as a whole; ``exchange.usage`` says what it took.

    Raises:
        QuotaExceeded, StateUnavailable: it is not let in.
    """
    admission = await admit(services, exchange, work)
    refused = False
    try:
        yield
    except PlatformError as error:
        refused = was_refused(error)
        raise
    finally:
        if services.meter is not None and admission is not None:
            spent = used(
                admission.reserved,
                usage=exchange.usage,
                remembered=exchange.remembered,
                seen=0,
                streamed=False,
                refused=refused,
            )
            if not exchange.worked:
                spent = Work()
            exchange.cost = services.meter.settle(admission, spent)


def was_refused(error: Exception | None) -> bool:
    """Whether the worker says that it has done nothing, or that it failed by itself."""
    if isinstance(error, Timeout):
        return error.details.get("phase") == "queue"
    return isinstance(error, PlatformError)
