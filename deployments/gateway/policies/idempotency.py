"""A POST that comes again with its ``Idempotency-Key`` is not carried out again (spec C5).

    caller ──┐
    caller ──┼── follows ──> Flight ── claims ──> IdempotencyRecords
    caller ──┘                 └── works ──> the policies and the route inside

In one process there is one flight for a key, in a task of its own, and all who send the key
follow it: it outlives the caller that began it, but not the last one. Of all processes one
works, under a lease; the others look until it is done.

Kept are answers below 500. Not kept, so that who asks again is answered anew: 429, what is
about who asks (401, 403), 5xx, streams that broke, and what is too long.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway.body import read_body
from deployments.gateway.exchange import Exchange, exchange_of
from deployments.gateway.operation import Operation, Repeat
from deployments.gateway.policies.failures import Failures
from deployments.gateway.recording import Recording
from deployments.tenants.idempotency import (
    HEADER,
    LEASE_S,
    Answer,
    Busy,
    IdempotencyRecords,
    Lease,
    another_request,
)
from models.errors import InternalError, InvalidInput
from state.errors import StateError
from state.patience import Patience

logger = logging.getLogger(__name__)

KEY = re.compile(rb"[\x21-\x7e]{1,255}")
UNAVAILABLE = 503
REPLAYED = (b"idempotent-replayed", b"true")
PASSING = frozenset({401, 403, 429})
"""Statuses below 500 that say who asked, or when, rather than what."""
OF_THE_MOMENT = (b"server-timing", b"x-ratelimit-", b"x-tokenlimit-")
"""Headers that are true of the first call only."""
LOOK_AGAIN_S = (0.05, 0.5)
"""How often to look whether another process is done, at first and later."""
INSIST_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""When to write again what could not be written; all of it while the lease lives."""
TIDY_S = 3600.0
"""How often each gateway deletes what has expired."""


def key_of(scope: Scope) -> str | None:
    """The key that a request comes with, if any. Raises InvalidInput: it cannot be one."""
    given = [value for name, value in scope["headers"] if name == b"idempotency-key"]
    if not given:
        return None
    if len(given) > 1 or not KEY.fullmatch(given[0]):
        raise InvalidInput(
            f"The {HEADER} is {b', '.join(given).decode('latin-1')!r:.80}; send one of 1 to 255"
            " visible ASCII characters, such as a UUID.",
            param=HEADER,
        )
    return str(given[0], "ascii")


def fingerprint_of(scope: Scope, body: bytes) -> str:
    """Of all that makes it this request."""
    digest = hashlib.sha256()
    for part in (scope["method"].encode(), scope["path"].encode(), scope["query_string"], body):
        digest.update(b"%d:" % len(part))  # or what ends one part could begin the next
        digest.update(part)
    return digest.hexdigest()


def is_kept(status: int, *, broken: bool, size: int, max_bytes: int) -> bool:
    """Whether an answer is written down for whoever asks again."""
    return not broken and status < 500 and status not in PASSING and size <= max_bytes


def is_lasting(header: bytes) -> bool:
    return not header.startswith(OF_THE_MOMENT)


class Idempotency:
    """Requests without the header cost nothing here.

    Args:
        operation_at: what answers a request, if anything does.
        max_body_bytes: of an answer that is kept.
        now: Unix seconds, for error bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        records: IdempotencyRecords,
        operation_at: Callable[[Scope], Operation | None],
        max_body_bytes: int,
        now: Callable[[], float],
    ) -> None:
        self.app = app
        self.work = Failures(app, now)  # an error is an answer, too, and kept as it was told
        self.records = records
        self.operation_at = operation_at
        self.max_body_bytes = max_body_bytes
        self._flights: dict[tuple[str, str], Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._tidy_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = operation = None
        if scope["type"] == "http" and scope["method"] == "POST":
            key = key_of(scope)
        if key is not None:
            operation = self.operation_at(scope)
        if key is None or operation is None or operation.repeat is Repeat.LEFT_TO_ROUTE:
            await self.app(scope, receive, send)
            return
        exchange = exchange_of(scope)
        exchange.route = operation.path_format
        exchange.require(operation.needs)  # a replay does not reach the route, which would ask
        body = await read_body(receive)
        fingerprint = fingerprint_of(scope, body)
        name = (exchange.tenant, key)
        flight = self._flights.get(name)
        if flight is None:
            flight = self._flights[name] = Flight(exchange, fingerprint)
            work = partial(self._work, flight, operation, scope, body)
            flight.task = self._spawn(self._fly(name, flight, work))
            self._tidy()
        elif flight.fingerprint != fingerprint:
            raise another_request(key)
        try:
            await flight.follow(exchange, send)
        finally:
            if flight.abandoned:
                self._land(name, flight)  # whoever comes now begins anew
                flight.task.cancel()
                await asyncio.wait([flight.task])  # only now it is known what was used
                exchange.account_for(flight.exchange)

    async def _fly(
        self, name: tuple[str, str], flight: Flight, work: Callable[[Lease], Awaitable[None]]
    ) -> None:
        try:
            found = await self._claim(*name, flight.fingerprint, flight.exchange.patience)
            if isinstance(found, Lease):
                flight.works = True
                await work(found)
            else:
                flight.recording.replay(found)
        except Exception as error:
            flight.recording.fail(error)
        finally:
            self._land(name, flight)
            flight.recording.fail(InternalError("The work on this was given up; try again."))

    async def _claim(
        self, tenant: str, key: str, fingerprint: str, patience: Patience
    ) -> Lease | Answer:
        """Raises Conflict, StateUnavailable."""
        async with patience.waiting("the database"):
            found = await self.records.begin(tenant, key, fingerprint)
        pause_s, longest_s = LOOK_AGAIN_S
        while isinstance(found, Busy):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)
            seen = await self.records.look(tenant, key, fingerprint)
            found = seen or await self.records.begin(tenant, key, fingerprint)
        return found

    async def _work(
        self, flight: Flight, operation: Operation, scope: Scope, body: bytes, lease: Lease
    ) -> None:
        exchange, recording = flight.exchange, flight.recording
        renewing = self._spawn(self._renew(lease))
        settled = False
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        never: asyncio.Future[Message] = asyncio.Future()

        async def receive() -> Message:
            # If all clients go the task is cancelled; nobody needs to listen for it.
            return unread.pop() if unread else await never

        async def record(message: Message) -> None:
            nonlocal settled
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                recording.begin(message)
                return
            piece, last = message.get("body", b""), not message.get("more_body", False)
            if last:
                # On disk before it is told: who asks again at once finds it.
                exchange.answered = settled = True
                renewing.cancel()
                # Who is told that state is out of reach is not kept waiting for it once more.
                patience = exchange.patience if exchange.status == UNAVAILABLE else Patience()
                await self._settle(self._verdict(flight, operation, lease, piece), patience)
                self._land((lease.tenant, lease.key), flight)
            recording.add(piece, last=last)

        try:
            await self.work({**scope, "exchange": exchange}, receive, record)
        finally:
            renewing.cancel()
            if not settled:
                await self._settle(partial(self.records.release, lease), Patience())

    def _verdict(
        self, flight: Flight, operation: Operation, lease: Lease, last: bytes
    ) -> Callable[[], Awaitable[bool]]:
        """What becomes of the record, now that the answer is whole."""
        exchange, recording = flight.exchange, flight.recording
        status = exchange.status or 500
        broken = exchange.error is not None and status < 400
        size = recording.size + len(last)
        if not is_kept(status, broken=broken, size=size, max_bytes=self.max_body_bytes):
            return partial(self.records.release, lease)
        if operation.repeat is Repeat.REFUSED and status < 400:
            return partial(self.records.finish, lease, None)
        return partial(self.records.finish, lease, recording.answer(last, is_lasting))

    async def _settle(self, write: Callable[[], Awaitable[bool]], patience: Patience) -> None:
        """A client is not kept waiting for a database that is down when its answer is there."""
        try:
            async with patience.waiting("the database"):
                await write()
        except StateError as error:
            logger.warning("an idempotency record could not be written: %s", error)
            self._spawn(self._insist(write))

    async def _insist(self, write: Callable[[], Awaitable[bool]]) -> None:
        for pause_s in INSIST_S:
            await asyncio.sleep(pause_s)
            try:
                await write()
            except StateError as error:
                logger.warning("an idempotency record could not be written: %s", error)
            else:
                return

    async def _renew(self, lease: Lease) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            try:
                if not await self.records.renew(lease):
                    logger.warning("a lease of %s was lost to another gateway", lease.tenant)
                    return
            except StateError as error:
                logger.warning("a lease of %s could not be renewed: %s", lease.tenant, error)

    def _land(self, name: tuple[str, str], flight: Flight) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]

    def _tidy(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._tidy_at:
            self._tidy_at = now + TIDY_S
            self._spawn(self._forget(), context=Context())  # in nobody's name

    async def _forget(self) -> None:
        try:
            await self.records.forget_expired()
        except StateError as error:
            logger.warning("expired idempotency records stay for now: %s", error)

    def _spawn(
        self, work: Coroutine[Any, Any, None], context: Context | None = None
    ) -> asyncio.Task[None]:
        task = asyncio.create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Flight:
    """One answer on its way to all who asked for it.

    The work has an exchange of its own, as it may outlive the request that began it. What it
    used is told to one of those who follow, the first that is still there: billed once.
    """

    task: asyncio.Task[None]

    def __init__(self, begun_by: Exchange, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.exchange = replace(begun_by)
        self.recording = Recording()
        self.works = False
        """False: what it tells was told before."""
        self._begun_by = begun_by
        self._followers: list[Exchange] = []
        self._accounted = False

    @property
    def abandoned(self) -> bool:
        return not self._followers and not self.recording.over

    async def follow(self, exchange: Exchange, send: Send) -> None:
        """Raises what the work raised."""
        first = exchange is self._begun_by

        def opening(start: Message) -> Message:
            exchange.failure_frame = self.exchange.failure_frame
            exchange.work = self.exchange
            if first and self.works:
                exchange.levels, exchange.calls = self.exchange.levels, self.exchange.calls
                return dict(start)
            headers = [header for header in start["headers"] if is_lasting(header[0])]
            return {**start, "headers": [*headers, REPLAYED]}

        self._followers.append(exchange)
        try:
            await self.recording.play(send, opening)
        finally:
            self._leave(exchange)

    def _leave(self, exchange: Exchange) -> None:
        work, first_in_line = self.exchange, self._followers[0] is exchange
        self._followers = [each for each in self._followers if each is not exchange]
        exchange.error = work.error
        if exchange is self._begun_by:
            exchange.first_output = work.first_output
            exchange.label(work)
        over = self.recording.over or not self._followers
        if first_in_line and over and not self._accounted:
            self._accounted = True
            exchange.account_for(work)
