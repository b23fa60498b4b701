"""What becomes of ten thousand tenants that share one engine: a simulation.

``python -m benchmarks.fairness``

The scheduler and the queue are the real ones; time is not: a step takes what its tokens cost. Into
an engine that is three times overloaded come *crowds*, three tenants of weights 1, 2 and 4 that
always have many requests waiting, short and long ones; and ten thousand *guests* with one request
each, short after one another. The same arrivals are served by

- tokens: weighted fair shares of the tokens, as the platform serves them;
- requests: a turn for each tenant in the round, whatever it costs;
- arrival: first come, first served.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.report import Report, table
from deployments.config import PriorityClass
from deployments.engines.admission import Limits, admit
from deployments.engines.queue import Ticket, WaitingQueue
from deployments.engines.scheduler import Scheduler
from deployments.engines.sequence import Call
from models.contracts import GenerateRequest, Priority, Sampling

SLOTS, STEP_TOKENS = 32, 256
STEP_S, TOKEN_S = 0.008, 0.0006
"""Of a step, and of each of its tokens: what SmolLM2-135M takes on two cores, rounded."""
CROWDS = {"crowd x1": 1, "crowd x2": 2, "crowd x4": 4}
LIMITS = Limits(context=2048, vocabulary=2, max_choices=1)


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    tenant: str
    weight: int
    prompt: int
    answer: int


class ByRequests(WaitingQueue[Call]):
    """A turn costs the same, whatever is computed in it."""

    def pop(self, *, cost: int | None = None) -> Ticket[Call] | None:
        return super().pop(cost=1)

    def charge(self, ticket: Ticket[Call], tokens: int) -> None:
        pass


@dataclass(slots=True)
class Outcome:
    waits: list[float] = field(default_factory=list)
    """Of guests, in seconds, until their request joined the batch."""
    served: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """Of each crowd: when, and the tokens that had been computed for it."""


def arrivals(guests: int, seed: int) -> list[Arrival]:
    """Guests come evenly through the time in which the engine could serve them alone, thrice."""
    draw = random.Random(seed)
    sizes = [(draw.randint(20, 60), draw.randint(5, 60)) for _ in range(guests)]
    rate = SLOTS / (STEP_S + SLOTS * TOKEN_S)  # tokens a second, when all slots decode
    length = 3 * sum(prompt + answer for prompt, answer in sizes) / rate
    came = [
        Arrival(draw.uniform(0, length), f"guest {number}", 1, *size)
        for number, size in enumerate(sizes)
    ]
    for tenant, weight in CROWDS.items():
        at = 0.0
        while at < length:
            size = (draw.randint(20, 60), 10) if draw.random() < 0.5 else (300, 150)
            came.append(Arrival(at, tenant, weight, *size))
            at += sum(size) / rate  # each alone would fill the engine
    return sorted(came, key=lambda arrival: arrival.at)


def simulate(
    came: Sequence[Arrival], queue: type[WaitingQueue[Call]], *, tell_apart: bool
) -> Outcome:
    now = 0.0

    def clock() -> float:
        return now

    room = PriorityClass(capacity=len(came), weight=1, timeout_s=10**6)
    waiting = queue({Priority.STANDARD: room}, clock=clock)
    scheduler = Scheduler(waiting, slots=SLOTS, step_tokens=STEP_TOKENS, clock=clock)
    outcome, tokens, whose = Outcome(), dict.fromkeys(CROWDS, 0), dict[str, str]()
    coming = iter(came)
    nearest = next(coming, None)
    while nearest is not None or not scheduler.idle:
        while nearest is not None and nearest.at <= now:
            request = GenerateRequest(
                id=str(len(whose)),
                model="m",
                prompt=(0,),
                tenant=nearest.tenant if tell_apart else "everybody",
                weight=nearest.weight,
                sampling=Sampling(max_tokens=nearest.answer),
            )
            whose[request.id] = nearest.tenant
            prompt = tuple(len(whose) >> bit & 1 for bit in range(nearest.prompt))  # none alike
            scheduler.add(admit(request, prompt, LIMITS, arrived=nearest.at))
            nearest = next(coming, None)
        plan = scheduler.plan()
        for call in plan.started:
            if whose[call.request.id] not in CROWDS:
                outcome.waits.append(now - call.arrived)
        if plan.step is None:
            assert nearest is not None
            now = nearest.at
            continue
        now += STEP_S + TOKEN_S * sum(len(chunk.tokens) for chunk in plan.step.chunks)
        scheduler.commit(plan.step)
        for chunk in plan.step.chunks:
            tenant = whose[chunk.sequence.call.request.id]
            if tenant in CROWDS:
                tokens[tenant] += len(chunk.tokens)
            if chunk.samples:
                chunk.sequence.tokens.append(0)
                if chunk.sequence.generated >= chunk.sequence.max_tokens:
                    scheduler.finish(chunk.sequence)
        for tenant, count in tokens.items():
            outcome.served[tenant].append((now, count))
        if nearest is None:
            break  # what the crowds have left is no longer contended for
    return outcome


def plot(outcomes: dict[str, Outcome], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, outcome in outcomes.items():
        waits = np.sort(outcome.waits)
        left.plot(np.maximum(waits, 0.01), np.linspace(0, 1, len(waits)), label=f"by {name}")
    left.set(xscale="log", xlabel="a guest's wait, s", ylabel="share of guests")
    left.legend()
    for tenant, points in outcomes["tokens"].served.items():
        times, counts = zip(*points[:: max(1, len(points) // 500)], strict=True)
        right.plot(times, np.array(counts) / 1e6, label=tenant)
    right.set(xlabel="s", ylabel="tokens computed by shares of tokens, millions")
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--guests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    came = arrivals(options.guests, options.seed)
    outcomes = {
        "tokens": simulate(came, WaitingQueue, tell_apart=True),
        "requests": simulate(came, ByRequests, tell_apart=True),
        "arrival": simulate(came, WaitingQueue, tell_apart=False),
    }
    report = Report("fairness", "How tenants share an engine that is overloaded")
    report.add(
        f"Simulated: {options.guests} guests with a request each, beside three crowds that never"
        f" end; {len(came)} requests. Seconds are simulated."
    )
    rows = []
    for name, outcome in outcomes.items():
        half, most = np.percentile(outcome.waits, [50, 99]).tolist()
        last = {tenant: points[-1][1] for tenant, points in outcome.served.items()}
        least = last["crowd x1"]
        shares = " : ".join(f"{last[tenant] / least:.2f}" for tenant in CROWDS)
        rows.append((f"by {name}", half, most, max(outcome.waits), len(outcome.waits), shares))
    head = ("served", "guests' wait p50 s", "p99 s", "longest s", "guests served", "crowds' tokens")
    report.add(table(head, rows))
    picture = report.path.with_suffix(".png")
    report.add(f"![Waits and shares]({picture.name})")
    report.write()
    plot(outcomes, picture)


if __name__ == "__main__":
    main()
