"""What the gateway comes to know of one request between its arrival and its end.

The outermost policy makes it; policies and routes write down what they learn; the access
policy tells the subscribers when all is over. On a WebSocket every request has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

from starlette.types import Scope

from deployments.caching.reuse import BY_WORK, Outcome, Wish
from deployments.guardrails.checks import Inquiry
from deployments.observability.events import Emit, RequestFinished
from deployments.tenants.principal import Principal
from deployments.tenants.principal import Scope as Right
from deployments.tenants.sight import EVERYTHING, Sight
from models.contracts import (
    NO_USAGE,
    NO_VERSIONS,
    Delta,
    Priority,
    Timings,
    Usage,
    Versions,
    sum_of,
)
from models.errors import PlatformError, Unauthorized
from state.counters import Level
from state.patience import Patience

UNMATCHED = "(unmatched)"
CLIENT_GONE = 499


@dataclass(slots=True, kw_only=True)
class Exchange:
    id: str
    method: str
    arrived: float
    """On the services' clock."""
    route: str = UNMATCHED
    model: str | None = None
    adapter: str | None = None
    """Of the model. Kept apart: a metric's labels may not be whatever a client writes."""
    versions: Versions = NO_VERSIONS
    """Of both."""
    fields: Set[str] = frozenset()
    """Of the request's schema: those that the client has set."""
    priority: Priority | None = None
    principal: Principal | None = None
    """``None`` on public routes."""
    tenant: str = "public"
    levels: Sequence[Level] = ()
    """Where the tenant's limits stand."""
    cost: int = 0
    """Millionths of the currency."""
    deadline: float | None = None
    patience: Patience = field(default_factory=Patience)
    """With the state that has to be asked before any work begins."""
    status: int | None = None
    """``None`` until the answer has begun."""
    answered: bool = False
    """The last byte has been handed to the server."""
    client_gone: bool = False
    error: PlatformError | None = None
    first_output: float | None = None
    """When a stream's first output was there."""
    choices: int = 1
    wish: Wish = field(default_factory=Wish)
    """Of the cache."""
    calls: int = 1
    """To models."""
    outcomes: list[Outcome] = field(default_factory=list)
    """What the cache did for those of the calls that have heard from it."""
    usage: Usage | None = None
    remembered: Usage = NO_USAGE
    """The part of ``usage`` that others have paid for: it came from the cache."""
    timings: Timings | None = None
    failure_frame: Callable[[PlatformError], bytes] | None = None
    """How a stream that has begun tells its client of a failure."""
    work: Exchange | None = None
    """What answers this request and, maybe, others (``policies/idempotency.py``)."""

    def belongs_to(self, principal: Principal) -> None:
        self.principal = principal
        self.tenant = principal.tenant

    def require(self, right: Right | None) -> None:
        """Raises Forbidden, Unauthorized: whoever asks may not. ``None``: everybody may."""
        if right is None:
            return
        if self.principal is None:
            raise Unauthorized("This route needs an API key.")
        self.principal.require(right)

    @property
    def plan(self) -> str | None:
        """Of whoever asks; ``None``: without limits."""
        return None if self.principal is None else self.principal.plan

    @property
    def subject(self) -> str:
        """Who asks, for the audit log."""
        return self.principal.subject if self.principal is not None else "anyone"

    @property
    def sight(self) -> Sight:
        """What whoever asks may see of the models."""
        return EVERYTHING if self.principal is None else self.principal.sight

    @property
    def called(self) -> str | None:
        """The model as the client calls it."""
        return self.model if self.adapter is None else f"{self.model}:{self.adapter}"

    @property
    def outcome(self) -> Outcome | None:
        """What the cache did for the request: the most work that any of its calls took.

        A call that has not heard yet may become any. ``None``: it had nothing to do.
        """
        if not self.outcomes:
            return None
        if len(self.outcomes) < self.calls:
            return Outcome.MISS
        return max(self.outcomes, key=BY_WORK.index)

    @property
    def worked(self) -> bool:
        """False: all of the answer was remembered, or computed for another request."""
        return self.outcome in (None, Outcome.MISS)

    def inquiry(self, emit: Emit) -> Inquiry:
        """For the guardrails, once its priority is known."""
        return Inquiry(tenant=self.tenant, priority=self.priority or Priority.STANDARD, emit=emit)

    def account(self, last: Delta) -> None:
        """Add what the last delta of a generator call reports.

        Several prompts of one request run side by side: tokens add up, and the slowest
        says where the time went.
        """
        if (usage := last.usage) is not None:
            self.usage = usage if self.usage is None else sum_of([self.usage, usage])
            if last.timings is None:  # nobody has computed it for this request
                self.remembered = sum_of([self.remembered, usage])
        if (timings := last.timings) is not None and (
            self.timings is None or timings.total_s > self.timings.total_s
        ):
            self.timings = timings

    def label(self, work: Exchange) -> None:
        """Note what was asked for, where ``work`` is a copy of an exchange that went its own way.

        A work that several requests wait for has its own (``policies/idempotency.py``).
        """
        self.model, self.adapter, self.priority = work.model, work.adapter, work.priority
        self.versions = work.versions

    def account_for(self, work: Exchange) -> None:
        """Take upon this request all that ``work`` used. One of those that waited does."""
        self.label(work)
        self.choices, self.usage, self.timings = work.choices, work.usage, work.timings
        self.cost, self.remembered = work.cost, work.remembered
        self.calls, self.outcomes = work.calls, work.outcomes

    def finished(self, at: float) -> RequestFinished:
        """The event that closes the exchange."""
        gone = self.client_gone and not self.answered
        return RequestFinished(
            request_id=self.id,
            route=self.route,
            method=self.method,
            status=CLIENT_GONE if gone else self.status or 500,
            code=None if self.error is None else self.error.code,
            duration_s=at - self.arrived,
            model=self.model,
            priority=self.priority,
            tenant=self.tenant,
            subject=self.subject,
            adapter=self.adapter,
            versions=self.versions,
            cost=self.cost,
            worked=self.worked,
            outcome=self.outcome,
            remembered=self.remembered,
            ttft_s=None if self.first_output is None else self.first_output - self.arrived,
            choices=self.choices,
            usage=self.usage,
            timings=self.timings,
        )


def exchange_of(scope: Scope) -> Exchange:
    exchange: Exchange = scope["exchange"]
    return exchange
