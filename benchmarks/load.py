"""The whole platform over HTTP: latency, throughput, goodput, overhead and memory.

``python -m benchmarks.load``

Starts the platform as ``scripts/serve`` does and loads it from this process, closed-loop
(so many clients, each with one request at a time) and open-loop (requests arrive by a
Poisson process whether or not earlier ones are answered, as users do). Between the rounds, the same
engine answers the same requests of as many clients in a process of its own, with nothing else
running: the price of serving is what a round has of the mean of its two neighbours, so that a
machine's drift does not pass for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import psutil

from benchmarks.report import Report, table
from deployments.config import GenerateModel
from deployments.engines.engine import Engine
from deployments.launcher import preflight
from deployments.launcher.background import Served, serving
from models.contracts import ChatMessage, Conversation, GenerateRequest, Sampling
from models.sources import fetch

MODEL = "smollm2"
NEW_TOKENS = 64
SHORT_TOKENS, SHORT_REQUESTS = 8, 100
"""Of what overhead is found by: there need be many of them, and the engine's share is known."""
MOST = 32
"""Clients at once."""
PROMPT = "is my lucky number. Tell me a long story about it, a dragon and a lighthouse."
CONFIG = Path("serve_config.yaml")
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its client saw it, in seconds."""

    total: float
    at: float = 0.0
    """When it began, from the beginning of the load."""
    ttft: float | None = None
    """Only where the answer was streamed."""
    tokens: int = 0
    engine: float = 0.0
    """Prefill and decode, as the engine says."""
    failed: bool = False

    def tokens_within(self, seconds: float) -> float:
        """Those that came by then, if they came evenly: one late request is not the load's end."""
        return self.tokens * min(1.0, (seconds - self.at) / self.total)

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first."""
        if self.ttft is None or self.tokens < 2:
            return None
        return (self.total - self.ttft) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good."""

    ttft: float
    tpot: float

    def kept(self, sample: Sample) -> bool:
        tpot = sample.tpot
        return (
            not sample.failed
            and sample.ttft is not None
            and sample.ttft <= self.ttft
            and tpot is not None
            and tpot <= self.tpot
        )


def question(number: int) -> str:
    return f"{number} {PROMPT}"


def body(number: int, *, stream: bool, new_tokens: int) -> bytes:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question(number)}],
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    return json.dumps(request).encode()


async def ask(
    session: aiohttp.ClientSession, number: int, *, stream: bool, new_tokens: int = NEW_TOKENS
) -> Sample:
    began = time.perf_counter()
    ttft = None
    headers = {"content-type": "application/json"}
    data = body(number, stream=stream, new_tokens=new_tokens)
    async with session.post(CHAT, data=data, headers=headers) as response:
        if response.status != 200:
            await response.read()
            return Sample(time.perf_counter() - began, failed=True)
        if not stream:
            usage = json.loads(await response.read())["usage"]
            timing = server_timing(response.headers.get("Server-Timing", ""))
            return Sample(
                time.perf_counter() - began,
                tokens=usage["completion_tokens"],
                engine=timing.get("prefill", 0.0) + timing.get("decode", 0.0),
            )
        tail = b""
        async for chunk in response.content.iter_any():
            if ttft is None:
                ttft = time.perf_counter() - began
            tail = (tail + chunk)[-64:]
        return Sample(
            time.perf_counter() - began,
            ttft=ttft,
            tokens=new_tokens,
            failed=b"data: [DONE]" not in tail,
        )


def server_timing(header: str) -> dict[str, float]:
    """``Server-Timing`` → seconds by name."""
    found = re.findall(r"(\w+);dur=([0-9.]+)", header)
    return {name: float(milliseconds) / 1000 for name, milliseconds in found}


async def clients(
    answer: Callable[[int], Awaitable[Sample]], count: int, seconds: float
) -> tuple[list[Sample], float]:
    """Samples, and the seconds of the load; every client ends the request it has begun."""
    began = time.perf_counter()
    numbers = iter(range(10**9))
    samples: list[Sample] = []

    async def client() -> None:
        while (at := time.perf_counter() - began) < seconds:
            samples.append(replace(await answer(next(numbers)), at=at))

    await asyncio.gather(*(client() for _ in range(count)))
    return samples, seconds


async def closed_loop(
    session: aiohttp.ClientSession, count: int, seconds: float, *, stream: bool
) -> tuple[list[Sample], float]:
    """So many clients over HTTP, each with one request at a time."""
    return await clients(partial(ask, session, stream=stream), count, seconds)


async def open_loop(
    session: aiohttp.ClientSession, per_s: float, seconds: float, *, stream: bool
) -> tuple[list[Sample], float]:
    """Poisson arrivals, so many a second."""
    draw = random.Random(0)
    began = time.perf_counter()
    due = 0.0
    tasks: list[asyncio.Task[Sample]] = []

    async def one(number: int) -> Sample:
        at = time.perf_counter() - began
        return replace(await ask(session, number, stream=stream), at=at)

    while (due := due + draw.expovariate(per_s)) < seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(len(tasks))))
    return await asyncio.gather(*tasks), seconds


def rate(samples: Sequence[Sample], seconds: float) -> float:
    """Tokens a second."""
    return sum(s.tokens_within(seconds) for s in samples if not s.failed) / seconds


def row(name: str, samples: Sequence[Sample], seconds: float, slo: Slo) -> tuple[object, ...]:
    good = [s for s in samples if not s.failed]
    kept = sum(slo.kept(s) for s in samples)
    streamed = any(s.ttft is not None for s in good)
    return (
        name,
        len(samples),
        len(samples) - len(good),
        rate(samples, seconds),
        percentiles([s.ttft for s in good], 1000, "ms"),
        percentiles([s.tpot for s in good], 1000, "ms"),
        percentiles([s.total for s in good], 1, "s"),
        f"{kept / len(samples):.0%}" if streamed else "",
    )


HEAD = ("load", "requests", "failed", "tok/s", "TTFT ms", "TPOT ms", "end-to-end s", "goodput")


def percentiles(values: Sequence[float | None], scale: float, unit: str) -> str:
    """``p50 / p95 / p99``."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return ""
    digits = 0 if unit == "ms" and known[-1] * scale >= 10 else 2
    picks = (known[min(len(known) - 1, int(len(known) * q))] for q in (0.5, 0.95, 0.99))
    return " / ".join(f"{pick * scale:.{digits}f}" for pick in picks)


async def health_latency(session: aiohttp.ClientSession, count: int = 500) -> list[float]:
    latencies = []
    for _ in range(count):
        began = time.perf_counter()
        async with session.get("/healthz") as response:
            await response.read()
        latencies.append(time.perf_counter() - began)
    return latencies


def memory(served: Served) -> list[tuple[str, int, float, float]]:
    """Processes by kind: name, count, resident and proportional set size in MB."""
    kinds: dict[str, list[psutil.Process]] = {}
    for process in served.processes():
        kinds.setdefault(_kind(process), []).append(process)
    rows = []
    for kind, processes in kinds.items():
        infos = [info for process in processes if (info := _memory(process)) is not None]
        rss = sum(info.rss for info in infos) / 1e6
        pss = sum(info.pss for info in infos) / 1e6
        rows.append((kind, len(infos), rss, pss))
    rows.sort(key=lambda item: -item[3])
    total = sum(item[2] for item in rows), sum(item[3] for item in rows)
    return [*rows, ("all", sum(item[1] for item in rows), *total)]


def kv_cache(process: psutil.Process) -> tuple[float, float]:
    """Bytes of an engine's KV cache: resident, and asked for.

    Told from the rest by what ``engines/kv.py`` asks the kernel for there: no huge pages, which
    stacks of threads have in common with it, and no place in a core file, which they have not.
    """
    resident = asked = 0.0
    at: dict[str, float] = {}
    for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in {"Size", "Pss"}:
            at[name] = float(rest.split()[0]) * 1024
        elif name == "VmFlags" and {"dd", "nh"} <= set(rest.split()):  # the last line of a mapping
            resident += at["Pss"]
            asked += at["Size"]
    return resident, asked


def memory_figures(
    processes: Sequence[tuple[str, int, float, float]], kv: tuple[float, float]
) -> list[Figure]:
    """What has a goal, of the processes' proportional set sizes in MB and the KV cache's bytes."""
    pss = {kind: each for kind, _, _, each in processes}
    resident, asked = (each / 1e9 for each in kv)
    engine, whole = pss[f"replica {MODEL}"] / 1e3 - resident, pss["all"] / 1e3
    return [
        (f"KV cache of {MODEL}, GB, resident / asked for", f"{resident:.2f} / {asked:.2f}", "", ""),
        (f"replica {MODEL} beside its KV cache, GB", engine, "≤ 1.4", yes(engine <= 1.4)),
        ("whole platform with dashboard, GB", whole, "≤ 5", yes(whole <= 5)),
    ]


def _memory(process: psutil.Process) -> Any:
    try:
        return process.memory_full_info()
    except psutil.Error:
        return None


def _kind(process: psutil.Process) -> str:
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return "gone"
    replica = re.match(r"ray::ServeReplica:[\w-]+:(\w+)", title)
    if replica:
        return f"replica {replica[1]}"
    for word in ("ServeController", "ProxyActor", "HAProxy", "haproxy", "gcs_server", "raylet"):
        if word in title:
            return word
    if "dashboard" in title:
        return "dashboard"
    return "other"


def offline_rate(seconds: float) -> float:
    """Tokens a second of the engine alone, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_offline_rate, (seconds,))


def _offline_rate(seconds: float) -> float:
    platform = preflight.load(CONFIG).platform
    assert platform is not None
    model = platform.models[MODEL]
    assert isinstance(model, GenerateModel)
    return asyncio.run(_offline(model, seconds))


async def _offline(model: GenerateModel, seconds: float) -> float:
    engine = Engine(MODEL, fetch(model.source), model.engine, model.queue)

    async def answer(number: int) -> Sample:
        began = time.perf_counter()
        request = GenerateRequest(
            id=str(number),
            model=MODEL,
            prompt=Conversation((ChatMessage(role="user", content=question(number)),)),
            sampling=Sampling(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True),
        )
        async for _ in engine.generate(request):
            pass
        return Sample(time.perf_counter() - began, tokens=NEW_TOKENS)

    try:
        await clients(answer, 8, 3)  # warm, as what is served
        return rate(*await clients(answer, MOST, seconds))
    finally:
        engine.close()


@dataclass(slots=True)
class Measured:
    """What the loads found."""

    rows: list[tuple[object, ...]] = field(default_factory=list)
    rates: dict[tuple[int, bool], float] = field(default_factory=dict)
    """Tokens per second by number of clients and whether they stream."""
    overhead: list[float] = field(default_factory=list)
    """End-to-end minus engine, of one client at a time."""
    health: list[float] = field(default_factory=list)


async def load(url: str, seconds: float, slo: Slo, *, only_most: bool) -> Measured:
    """Args:
    only_most: no other load than that of the most clients.
    """
    measured = Measured()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)

    def add(name: str, samples: Sequence[Sample], took: float) -> None:
        measured.rows.append(row(name, samples, took, slo))
        print(measured.rows[-1], flush=True)

    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        await closed_loop(session, 8, 3, stream=True)  # warm
        for count in (MOST,) if only_most else (1, 8, MOST):
            for stream in (True, False):
                samples, took = await closed_loop(session, count, seconds, stream=stream)
                add(f"{count} clients, {'streamed' if stream else 'whole'}", samples, took)
                measured.rates[count, stream] = rate(samples, took)
        for number in range(SHORT_REQUESTS):
            sample = await ask(session, number, stream=False, new_tokens=SHORT_TOKENS)
            if not sample.failed:
                measured.overhead.append(sample.total - sample.engine)
        if only_most:
            return measured
        capacity = measured.rates[MOST, True] / NEW_TOKENS
        for share, stream in product((0.3, 0.6, 0.9), (True, False)):
            per_s = share * capacity
            samples, took = await open_loop(session, per_s, seconds, stream=stream)
            add(f"open loop, {per_s:.2f} req/s, {'streamed' if stream else 'whole'}", samples, took)
        measured.health = await health_latency(session)
    return measured


FIRST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}


async def back_after_a_kill(served: Served) -> float:
    """Seconds from the death of the only replica (``kill -9``) to the end of an answer."""
    served.replicas(MODEL)[0].kill()
    began = time.perf_counter()
    async with asyncio.timeout(120):
        while True:
            try:
                await first_answer(served.url)
                return time.perf_counter() - began
            except aiohttp.ClientError:
                await asyncio.sleep(0.2)


async def first_answer(url: str) -> None:
    """What a newcomer asks, to its end."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(url, timeout=timeout) as session,
        session.post(CHAT, json=FIRST) as answer,
    ):
        answer.raise_for_status()
        await answer.read()


Figure: TypeAlias = tuple[object, object, object, object]
"""What was measured, how much, its goal, and whether it was met; empty: there is none."""


def figures(
    rounds: Sequence[Measured], offline_rates: Sequence[float], start_s: float, back_s: float
) -> list[Figure]:
    """What has a goal."""
    served: list[Figure] = []
    for name, stream in (("whole answers", False), ("streamed", True)):
        found = shares(rounds, offline_rates, stream=stream)
        said = each_and_median(found, ".2f")
        met = statistics.median(found) >= 0.8
        served.append(
            (f"served : offline at {MOST} clients, {name}", said, "median ≥ 0.8", yes(met))
        )
    health = statistics.median(rounds[0].health)
    overhead = [statistics.median(each.overhead) * 1000 for each in rounds]
    return [
        (f"offline engine, {MOST} clients, tok/s", each_and_median(offline_rates, ".0f"), "", ""),
        *served,
        (
            "`/healthz` at 1 client, p50 / p95 / p99 ms",
            percentiles(rounds[0].health, 1000, "ms"),
            "p50 < 2",
            yes(health < 2e-3),
        ),
        (
            f"end-to-end minus engine at 1 client, ms, p50 of {SHORT_REQUESTS} answers of"
            f" {SHORT_TOKENS} tokens",
            each_and_median(overhead, ".1f"),
            "median < 8",
            yes(statistics.median(overhead) < 8),
        ),
        ("start to first answer, s, files in memory", start_s, "≤ 45", yes(start_s <= 45)),
        ("only replica killed to an answer, s", back_s, "≤ 30", yes(back_s <= 30)),
    ]


def yes(met: bool) -> str:
    return "yes" if met else "no"


def shares(
    rounds: Sequence[Measured], offline_rates: Sequence[float], *, stream: bool
) -> list[float]:
    """Of each round: what it served, of what the engine alone did before and after it."""
    alone = map(statistics.mean, pairwise(offline_rates))
    return [
        measured.rates[MOST, stream] / engine
        for measured, engine in zip(rounds, alone, strict=True)
    ]


def each_and_median(values: Sequence[float], form: str) -> str:
    each = ", ".join(f"{value:{form}}" for value in values)
    return f"{statistics.median(values):{form}} ({each})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=20, help="length of each load")
    parser.add_argument("--rounds", type=int, default=3, help="of the most clients")
    options = parser.parse_args()
    slo = Slo(ttft=2.0, tpot=0.2)
    offline_rates = [offline_rate(options.seconds)]
    rounds: list[Measured] = []
    for number in range(options.rounds):
        began = time.perf_counter()
        # As scripts/serve: a look at the weights, then the launcher.
        fetched = [sys.executable, "-m", "models", "fetch", "--config", str(CONFIG)]
        subprocess.run(fetched, check=True, stdout=subprocess.DEVNULL)
        with serving(CONFIG) as served:
            asyncio.run(first_answer(served.url))
            took = time.perf_counter() - began
            rounds.append(asyncio.run(load(served.url, options.seconds, slo, only_most=number > 0)))
            if number == 0:
                start_s = took
                processes = memory(served)
                kv = kv_cache(served.replicas(MODEL)[0])
                back_s = asyncio.run(back_after_a_kill(served))
        offline_rates.append(offline_rate(options.seconds))
    report = Report("load", "The platform under HTTP load")
    report.add(
        f"{NEW_TOKENS} new tokens a request, greedy. Percentiles are p50 / p95 / p99. Goodput:"
        f" share of requests with TTFT ≤ {slo.ttft} s and TPOT ≤ {slo.tpot} s. Each load ran"
        f" {options.seconds:.0f} s; the client shares the machine. {options.rounds} rounds, each on"
        " a platform just started and between two of the engine alone; all loads in the first."
    )
    report.add(table(HEAD, [line for measured in rounds for line in measured.rows]))
    head = ("figure", "measured", "goal", "met")
    report.add(table(head, figures(rounds, offline_rates, start_s, back_s)))
    report.add(
        "Memory after the load. Goals are for the proportional set size (PSS): processes of Ray"
        " share what they were forked with and the libraries they map, and each one's resident"
        " set size (RSS) has all of that again. The KV cache takes what has been used of it; the"
        " engine's goal is for what comes beside."
    )
    report.add(table(head, memory_figures(processes, kv)))
    report.add("By process, MB:")
    report.add(table(("process", "count", "RSS", "PSS"), processes))
    report.write()


if __name__ == "__main__":
    main()
