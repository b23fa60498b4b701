"""``python -m deployments.evaluation``: measure a served model for its promotion.

Asks a golden set, unsafe prompts and enough of both to know the error rate, and writes what
``python -m models promote`` decides by.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import httpx

from deployments.evaluation.client import Client
from deployments.evaluation.golden import GoldenSet
from deployments.evaluation.run import Load, measure
from deployments.evaluation.served import candidate
from models.errors import PlatformError
from models.promotion import COST, Measurements


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        found = asyncio.run(_measure(given))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(found.encode() + "\n")
    except PlatformError as error:
        print(f"evaluation: {error.message}", file=sys.stderr)
        return 1
    for line in summary(found):
        print(line)
    print(f"written to {given.out}")
    return 0


def summary(found: Measurements) -> list[str]:
    """Lines for a person."""
    lines = [
        f"artifact     {found.artifact:.12}",
        f"quality      {found.quality:.3f} over {len(found.scores)} items",
        f"errors       {found.errors} of {found.requests} requests",
    ]
    if found.safety is not None:
        lines.append(f"safety       {found.refused} of {found.to_refuse} unsafe prompts refused")
    if found.latency.p95 is not None:
        lines.append(f"p95          {found.latency.p95:.3f} s")
    if found.tokens_per_s is not None:
        lines.append(f"throughput   {found.tokens_per_s:.1f} tokens/s")
    if found.cost is not None:
        lines.append(f"cost         {found.cost:.4f} {COST}")
    return lines


async def _measure(given: argparse.Namespace) -> Measurements:
    golden = GoldenSet.read(given.golden)
    load = Load(
        concurrency=given.concurrency,
        requests=given.requests,
        prompt_price=given.prompt_price,
        completion_price=given.completion_price,
        request_price=given.request_price,
    )
    limits = httpx.Limits(max_connections=given.concurrency)
    async with (
        httpx.AsyncClient(base_url=given.url, timeout=given.timeout, limits=limits) as http,
        candidate(given.model, given.artifact) as asked,
    ):
        client = Client(http, asked.model, max_tokens=given.max_tokens)
        return await measure(client, golden, load, asked.identify, report=_progress)


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.evaluation", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--url", default="http://localhost:8000", help="of the gateway (%(default)s)")
    add("--model", required=True, help="as requests name it: smollm2:NAME@candidate, digits")
    add(
        "--golden",
        required=True,
        type=Path,
        help="JSON Lines: see evaluation/golden.py",
    )
    add("--out", required=True, type=Path, help="where the measurements go (JSON)")
    add("--artifact", help="content hash of what is served, if the registry cannot say it")
    add("--requests", type=_positive, default=200, help="at least so many (%(default)s)")
    add("--concurrency", type=_positive, default=4, help="clients at a time (%(default)s)")
    add("--max-tokens", type=_positive, default=64, help="of an answer (%(default)s)")
    add("--timeout", type=float, default=60.0, help="seconds for an answer (%(default)s)")
    add("--prompt-price", type=_price, default=0.0, help="USD per 1 000 tokens read")
    add("--completion-price", type=_price, default=0.0, help="USD per 1 000 tokens written")
    add("--request-price", type=_price, default=0.0, help="USD per 1 000 requests, besides")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _price(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
