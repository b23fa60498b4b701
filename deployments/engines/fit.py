"""Whether a model fits the engine: found out at load, by running it, never by its name.

The engine packs tokens of many sequences into one row and keeps what they need in its own
slots. A model that ignores this, because it keeps state elsewhere, attends in a way of its
own, or reads positions off the batch, would answer nonsense without any error. So two
short sequences run side by side, and their logits are held against the model's own.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from deployments.engines.linears import Groups, observed_groups, relative_difference
from deployments.engines.sequence import Call, Chunk, Sequence, Step
from models.contracts import GenerateRequest
from models.errors import ConfigError

if TYPE_CHECKING:
    from deployments.engines.runner import Runner

TOKENS = 12
TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.1
"""Largest accepted difference of the logits, relative to the largest of them: SmolLM2 has
2e-6 in float32, 0.002 in float16 and 0.02 in bfloat16.
"""


@torch.inference_mode()
def check_fit(runner: Runner) -> Groups:
    """Exchange the attention of the runner's model for the engine's, and compare.

    Returns:
        Its linear layers that share an input.

    Raises:
        ConfigError: the model does not run, or gives other logits.
    """
    name = type(runner.model).__name__
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, runner.vocab_size, (2, TOKENS), generator=generator)
    try:
        with observed_groups(runner.model) as groups:
            own = runner.model(input_ids=tokens.to(runner.device), use_cache=False).logits
        runner.attach()
        packed, beside_long = _packed(runner, tokens.tolist())
    except ConfigError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"{name} does not run on the embedded engine ({reason});"
            " it needs attention through transformers' AttentionInterface."
        ) from error
    tolerance = TOLERANCE if runner.dtype.itemsize >= 4 else HALF_PRECISION_TOLERANCE
    own = own[:, -packed.shape[1] :]
    difference = relative_difference(packed, own)
    if not difference <= tolerance:
        raise ConfigError(
            f"{name} gives other logits on the embedded engine than on its own"
            f" (relative difference {difference:.2g}); its attention is not a plain causal one."
        )
    difference = relative_difference(beside_long, own[0, -1])
    if not difference <= tolerance:
        raise ConfigError(
            f"{name} answers otherwise when a sequence of {runner.context} tokens runs beside"
            f" (relative difference {difference:.2g}), since it scales positions by the longest;"
            " set engine.context to the length it has without scaling."
        )
    return groups


@torch.inference_mode()
def probe(runner: Runner) -> torch.Tensor:
    """Logits ``[positions, vocabulary]`` after a short prompt and the tokens behind, one by one,
    through the engine's attention.
    """
    tokens = range(1, min(runner.vocab_size, TOKENS))
    steps = [Step(chunks=(chunk,)) for chunk in _chunks(0, list(tokens), 0)]
    return torch.cat([runner.run(step).logits for step in steps])


@torch.inference_mode()
def probe_end(runner: Runner) -> None:
    """Run a token at the end of the context, where what depends on positions shows."""
    [chunk] = _chunks(0, [1], 0)
    runner.run(Step(chunks=(_chunk(chunk.sequence, 0, runner.context - 1, [1]),)))


def _packed(runner: Runner, tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[2, positions, vocabulary]`` of the last positions of both sequences, run one
    pass apart; and ``[vocabulary]`` of the first one's last, beside the end of a long one.
    """
    lead, follow = _chunks(0, tokens[0], 0), _chunks(1, tokens[1], min(1, runner.cache.slots - 1))
    passes: list[tuple[Chunk | None, ...]] = [(chunk,) for chunk in (*lead, *follow)]
    if runner.cache.slots > 1:
        passes = list(zip_longest(lead, [None, *follow]))
    rows: tuple[list[torch.Tensor], ...] = ([], [])
    for chunks in passes:
        logits, order, _ = runner.run(Step(chunks=tuple(c for c in chunks if c)))
        for chunk, row in zip(order, logits, strict=True):
            rows[chunk.sequence.index].append(row)
    packed = torch.stack([torch.stack(sequence) for sequence in rows])
    if runner.cache.slots == 1:
        return packed, packed[0, -1]
    end = _chunk(follow[0].sequence, 1, runner.context - 1, [0])
    logits, order, _ = runner.run(Step(chunks=(lead[-1], end)))
    return packed, logits[order.index(lead[-1])]


def _chunks(index: int, tokens: list[int], slot: int) -> list[Chunk]:
    """The first half at once, the others one by one."""
    request = GenerateRequest(id="fit", model="", prompt=tuple(tokens))
    call = Call(request=request, prompt=tuple(tokens), arrived=0.0, deadline=0.0)
    sequence = Sequence(call=call, index=index, max_tokens=1, tokens=tokens)
    half = max(1, len(tokens) // 2)
    pieces = [(0, half), *((i, i + 1) for i in range(half, len(tokens)))]
    return [_chunk(sequence, slot, start, tokens[start:end]) for start, end in pieces]


def _chunk(sequence: Sequence, slot: int, start: int, tokens: list[int]) -> Chunk:
    return Chunk(sequence=sequence, slot=slot, start=start, tokens=tuple(tokens), samples=True)


def first_line(error: Exception) -> str:
    """Libraries like to append what else could be; the first line says what is."""
    return next(iter(str(error).strip().splitlines()), "")
