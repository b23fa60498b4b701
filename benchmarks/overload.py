"""Three times more than the engine can do: who is served at once, who waits, who is sent away.

``python -m benchmarks.overload``

The platform is started as ``scripts/serve`` starts it. vip requests come by a Poisson process,
first alone, then while low requests come three times as fast as the engine can answer any.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp

from benchmarks.load import CHAT, CONFIG, MODEL, NEW_TOKENS, closed_loop, percentiles, rate
from benchmarks.report import Report, table
from deployments.launcher.background import serving
from models.contracts import Priority

OVERLOAD = 3.0
VIP_RATE = 1.0
"""Requests a second."""
GOAL = 1.5
PROMPT = "Is the ferry to the island running today? I have to be there by noon, with"


@dataclass(slots=True)
class Heard:
    """What the clients of one class were told."""

    ttft: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    retry_after: list[float] = field(default_factory=list)
    """Of those that were sent away, in seconds."""


async def ask(
    session: aiohttp.ClientSession, priority: Priority, heard: Heard, number: int
) -> None:
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"{PROMPT} {number} bags."}],
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "priority": priority,
    }
    headers = {"content-type": "application/json"}
    began = time.perf_counter()
    async with session.post(CHAT, data=json.dumps(request), headers=headers) as response:
        if response.status != 200:
            error = (await response.json())["error"]
            heard.statuses[f"{response.status} {error['code']}"] += 1
            if after := response.headers.get("Retry-After"):
                heard.retry_after.append(float(after))
            return
        first, last, failed = None, b"", None
        async for line in response.content:
            # Comments say that one still waits; events are one line each.
            if line.startswith(b"data:"):
                first = first or time.perf_counter() - began
                last = line.removeprefix(b"data:").strip()
                if last.startswith(b'{"error"'):
                    failed = json.loads(last)["error"]["code"]
        if failed is not None:
            heard.statuses[f"{failed} in the stream"] += 1
        elif last == b"[DONE]":
            assert first is not None
            heard.ttft.append(first)
            heard.statuses["answered"] += 1
        else:
            heard.statuses["cut off"] += 1


async def arrive(
    session: aiohttp.ClientSession, priority: Priority, per_s: float, seconds: float
) -> Heard:
    """Poisson arrivals for so long, and until all have been told."""
    draw = random.Random(priority)
    heard, due, began = Heard(), 0.0, time.perf_counter()
    tasks: list[asyncio.Task[None]] = []
    while (due := due + draw.expovariate(per_s)) < seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(session, priority, heard, len(tasks))))
    await asyncio.gather(*tasks)
    return heard


@dataclass(frozen=True, slots=True)
class Measured:
    capacity: float
    """Requests a second, of 32 clients."""
    alone: Heard
    vip: Heard
    low: Heard


async def measure(url: str, seconds: float) -> Measured:
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        await closed_loop(session, 8, 3, stream=True)  # warm
        capacity = rate(*await closed_loop(session, 32, 15, stream=True)) / NEW_TOKENS
        alone = await arrive(session, Priority.VIP, VIP_RATE, seconds)
        vip, low = await asyncio.gather(
            arrive(session, Priority.VIP, VIP_RATE, seconds),
            arrive(session, Priority.LOW, OVERLOAD * capacity, seconds),
        )
    return Measured(capacity, alone, vip, low)


def p95(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=90, help="length of each load")
    options = parser.parse_args()
    with serving(CONFIG) as served:
        measured = asyncio.run(measure(served.url, options.seconds))
    report = Report("overload", "Three times more than the engine can do")
    report.add(
        f"{NEW_TOKENS} new tokens a request, streamed. 32 clients are answered"
        f" {measured.capacity:.1f} requests a second; then {OVERLOAD * measured.capacity:.1f} low"
        f" ones came each second, beside {VIP_RATE:.0f} vip, for {options.seconds:.0f} s; the"
        " client shares the machine. Percentiles are p50 / p95 / p99."
    )
    rows = [
        (
            name,
            heard.statuses.total(),
            ", ".join(f"{count} {what}" for what, count in heard.statuses.most_common()),
            percentiles(heard.ttft, 1000, "ms"),
            percentiles(heard.retry_after, 1, "s"),
        )
        for name, heard in (
            ("vip, alone", measured.alone),
            ("vip, overloaded", measured.vip),
            ("low, overloaded", measured.low),
        )
    ]
    report.add(table(("class", "requests", "of these", "TTFT ms", "`Retry-After` s"), rows))
    ratio = p95(measured.vip.ttft) / p95(measured.alone.ttft)
    goals = [
        ("vip TTFT p95, overloaded : alone", ratio, f"≤ {GOAL}", ratio <= GOAL),
        (
            "vip requests answered",
            f"{measured.vip.statuses['answered']} of {measured.vip.statuses.total()}",
            "all",
            len(measured.vip.statuses) == 1,
        ),
        (
            "low requests sent away with `Retry-After`",
            len(measured.low.retry_after),
            "some",
            bool(measured.low.retry_after),
        ),
    ]
    report.add(
        table(
            ("figure", "measured", "goal", "met"),
            [(*figures, "yes" if met else "**no**") for *figures, met in goals],
        )
    )
    report.write()


if __name__ == "__main__":
    main()
