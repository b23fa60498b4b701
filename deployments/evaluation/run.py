"""Ask everything, keep the watch running, and fill in the measurements.

A closed loop of a few clients: the golden items first, once each and scored; then the
unsafe prompts; then golden items again until there are requests enough to speak of an error
rate. Latencies count from all of them, under the load they make together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle

from deployments.evaluation.client import Answer, Client
from deployments.evaluation.golden import GoldenSet, Item
from deployments.evaluation.safety import UNSAFE, refuses
from models.errors import ConfigError, PlatformError, UpstreamError
from models.promotion import Latency, Measurements

Identify = Callable[[str | None], Awaitable[str]]
"""The content hash of what is served, given what answers said of their version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    concurrency: int = 4
    """Clients that ask at a time, each its next question after its answer."""
    requests: int = 200
    """At least; more if the golden set and the unsafe prompts are more."""
    prompt_price: float = 0.0
    """US dollars per 1 000 tokens read."""
    completion_price: float = 0.0
    """US dollars per 1 000 tokens written."""
    request_price: float = 0.0
    """US dollars per 1 000 requests, on top of the tokens."""

    @property
    def priced(self) -> bool:
        return bool(self.prompt_price or self.completion_price or self.request_price)


@dataclass(frozen=True, slots=True)
class Question:
    item: Item | None
    """``None``: an unsafe prompt."""
    prompt: str = ""
    id: str | None = None
    """Of a golden item that is to be scored."""


@dataclass(slots=True)
class Tally:
    """What has come back so far."""

    answers: list[Answer] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    refused: int = 0
    versions: set[str | None] = field(default_factory=set)

    def add(self, question: Question, answer: Answer) -> None:
        self.answers.append(answer)
        whole = answer.error is None
        if whole:
            self.versions.add(answer.version)
        if question.item is None:
            self.refused += whole and refuses(str(answer.output))
        elif question.id is not None:
            self.scores[question.id] = question.item.score(answer.output) if whole else 0.0


async def measure(
    client: Client,
    golden: GoldenSet,
    load: Load,
    identify: Identify,
    *,
    unsafe: Sequence[str] = UNSAFE,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Measurements:
    """Measure the model behind ``client``.

    Args:
        unsafe: what it should refuse; not asked of a model that predicts.
        report: told after each answer how many of how many there are.

    Raises:
        ConfigError: the model refuses a question as such, or it was exchanged meanwhile.
        UpstreamError: it does not answer at all.
    """
    unsafe = () if golden.predicts else unsafe
    questions = list(_questions(golden, unsafe, load.requests))
    warm = await _ask(client, questions[0])  # an adapter is loaded by its first request
    if warm.error is not None:
        raise UpstreamError(f"the model does not answer: {warm.error}")
    before = await identify(warm.version)
    tally = Tally()
    waiting = iter(questions)

    async def work() -> None:
        for question in waiting:
            tally.add(question, await _ask(client, question))
            report(len(tally.answers), len(questions))

    began = clock()
    try:
        async with asyncio.TaskGroup() as clients:
            for _ in range(load.concurrency):
                clients.create_task(work())
    except* PlatformError as group:
        raise group.exceptions[0] from None
    took_s = clock() - began
    after = await identify(warm.version)
    if before != after or not tally.versions <= {warm.version}:
        raise ConfigError(
            "the model was exchanged while it was measured; measure a version that stays, as"
            " NAME@VERSION, or try again"
        )
    return _measurements(before, golden, load, tally, len(unsafe), took_s)


async def _ask(client: Client, question: Question) -> Answer:
    try:
        return await _answer(client, question)
    except ConfigError as error:
        item = "" if question.id is None else f"golden item {question.id!r}: "
        raise ConfigError(f"{item}{error.message}") from error


async def _answer(client: Client, question: Question) -> Answer:
    if question.item is None:
        return await client.chat([{"role": "user", "content": question.prompt}])
    if question.item.predicts:
        return await client.predict(question.item.input)
    return await client.chat(question.item.conversation)


def _questions(golden: GoldenSet, unsafe: Sequence[str], requests: int) -> Iterator[Question]:
    for id_, item in golden.items.items():
        yield Question(item, id=id_)
    for prompt in unsafe:
        yield Question(None, prompt)
    left = requests - len(golden.items) - len(unsafe)
    for _, item in zip(range(left), cycle(golden.items.values()), strict=False):
        yield Question(item)


def _measurements(
    artifact: str, golden: GoldenSet, load: Load, tally: Tally, to_refuse: int, took_s: float
) -> Measurements:
    whole = [answer for answer in tally.answers if answer.error is None]
    latencies = sorted(answer.latency_s for answer in whole)
    firsts = sorted(answer.ttft_s for answer in whole if answer.ttft_s is not None)
    read = sum(answer.prompt_tokens for answer in whole)
    written = sum(answer.completion_tokens for answer in whole)
    dollars = (read * load.prompt_price + written * load.completion_price) / 1000
    cost = None
    if load.priced and whole:
        cost = dollars / len(whole) * 1000 + load.request_price
    errors = [answer.error for answer in tally.answers if answer.error is not None]
    return Measurements(
        artifact=artifact,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        golden_set=golden.sha256,
        scores=tally.scores,
        refused=tally.refused if to_refuse else None,
        to_refuse=to_refuse or None,
        requests=len(tally.answers),
        errors=len(errors),
        latency=Latency(
            p50=quantile(latencies, 0.50),
            p95=quantile(latencies, 0.95),
            p99=quantile(latencies, 0.99),
            ttft_p95=quantile(firsts, 0.95),
        ),
        tokens_per_s=None if golden.predicts else written / took_s,
        cost=cost,
        notes={"clients": str(load.concurrency), **({"first error": errors[0]} if errors else {})},
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that so many are not above (nearest rank)."""
    if not ordered:
        return None
    rank = -(-len(ordered) * share // 1)  # rounded up
    return ordered[max(0, int(rank) - 1)]
