"""The vocabulary of what happens while serving. Cores emit these; they import no metrics library.

Events are facts about the past, frozen, with durations in seconds. A subscriber must
return at once and never raise into the core that told it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from deployments.caching.reuse import Outcome
from deployments.guardrails.kinds import Done, Way
from models.contracts import NO_USAGE, NO_VERSIONS, Priority, Timings, Usage, Versions


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished:
    """The gateway has answered, or the client has gone."""

    request_id: str
    route: str
    """The route's template (``/v1/models/{model}``), never a raw path: bounded cardinality."""
    method: str
    status: int
    """HTTP status; 499 for a client that left before the end."""
    code: str | None
    """The error's code where the final state is a failure, also after a 200 header on a stream."""
    duration_s: float
    model: str | None = None
    """Only names that are configured."""
    priority: Priority | None = None
    tenant: str = "public"
    subject: str = "anyone"
    """Key or person; never a label of a metric."""
    adapter: str | None = None
    """As the client called it; never a label of a metric."""
    versions: Versions = NO_VERSIONS
    """Of model and adapter, as far as they are known."""
    cost: int = 0
    """Millionths of the currency."""
    worked: bool = True
    """False: all of the answer was remembered, or computed for another request."""
    outcome: Outcome | None = None
    """What the cache did for it; ``None``: it had nothing to do."""
    remembered: Usage = NO_USAGE
    """The part of ``usage`` that nobody computed for this request."""
    ttft_s: float | None = None
    """Arrival at the gateway to the first output byte."""
    choices: int = 1
    """Continuations that were asked for, over all prompts of the request."""
    usage: Usage | None = None
    timings: Timings | None = None
    """What the engine measured; the gateway's own share is ``duration_s`` minus ``total_s``."""

    @property
    def failed(self) -> bool:
        """By our fault: also where a stream that had begun ended in an error."""
        return self.status >= 500 or (self.code is not None and self.status < 400)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFinished:
    """A replica has computed all of an answer."""

    request_id: str
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStarted:
    """A request left the waiting queue and joined a batch."""

    model: str
    priority: Priority
    queue_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPreempted:
    """A request left the batch for one of a higher priority, and waits to go on."""

    model: str
    priority: Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShed:
    """Refused or dropped while waiting: ``full``, ``displaced``, ``expired`` or ``cancelled``."""

    model: str
    priority: Priority
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRan:
    """One step of an engine, or one batch of a predictor."""

    model: str
    rows: int
    """Sequences, or inputs, computed together."""
    duration_s: float
    prefill_tokens: int = 0
    decode_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFailed:
    """A step raised; every request in it was told."""

    model: str
    rows: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """A replica's occupancy, after a change."""

    model: str
    running: int
    waiting: dict[Priority, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLoaded:
    """A replica has read an adapter into memory."""

    model: str
    duration_s: float
    """Checks and reading; what finding its folder took is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFailed:
    """An adapter did not fit, or could not be found or read for a reason of ours."""

    model: str
    adapter: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEvicted:
    """The adapter unused for longest made room for another."""

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersResident:
    """What a replica's adapters take in memory, after a change."""

    model: str
    adapters: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaDenied:
    """A request was refused because a limit of its tenant is reached."""

    tenant: str
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetReached:
    """A tenant's monthly budget is used up to ``share``, as one gateway sees it first."""

    tenant: str
    share: float
    resets_in_s: float | None = None
    """Until the month of the counters is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAsked:
    """An answer that may be cached was asked for. A failure may have followed."""

    model: str
    outcome: Outcome
    times: int = 1
    """Inputs, of an embedding call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardrailActed:
    """A guardrail did something about a text; nothing of the text is in here."""

    guardrail: str
    category: str
    """Only names that are configured."""
    done: Done
    way: Way
    tenant: str = "public"
    times: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertRaised:
    """Something that somebody should hear of: once, whichever gateways have seen it."""

    id: int
    tenant: str
    kind: str
    """``budget``."""
    period: str
    """The month, as ``2026-11``."""
    threshold: int
    """Percent."""


Event: TypeAlias = (
    RequestFinished
    | GenerationFinished
    | RequestStarted
    | RequestPreempted
    | RequestShed
    | BatchRan
    | BatchFailed
    | EngineState
    | AdapterLoaded
    | AdapterFailed
    | AdapterEvicted
    | AdaptersResident
    | QuotaDenied
    | BudgetReached
    | CacheAsked
    | GuardrailActed
    | AlertRaised
)
Emit: TypeAlias = Callable[[Event], None]


def discard(event: Event) -> None:
    """Tell nobody: for tests and tools."""


def fan_out(*subscribers: Emit) -> Emit:
    """Tell several, in order."""

    def emit(event: Event) -> None:
        for subscriber in subscribers:
            subscriber(event)

    return emit
