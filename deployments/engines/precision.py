"""In which precision a model computes on the CPU: int8, if it then answers as well.

The layers are calibrated on one text and judged on another, at the first load: how probable the
text is to the model (perplexity), and how often the likeliest next token stays the same. Both texts
come with Python. Of the output layer, which matters most, int8 only finds what float32 computes
again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from deployments.engines.calibration import Calibration, Kept, Quality, calibrated, to_int8
from deployments.engines.linears import Groups, put_back

_log = logging.getLogger(__name__)

WINDOW = 256
"""Tokens that are read together."""
CALIBRATED_ON, JUDGED_ON = 16, 4
"""Windows."""
LEAST_TEXT = 1000
"""Tokens, to judge anything by."""
TOPICS, TOPIC_CHARACTERS = 40, 600
MOST_PERPLEXITY = 1.02
"""Of int8, relative to float32. The text is short, so it is a bound against what goes wrong."""
LEAST_AGREEMENT = 0.9


def house_text(folder: Path) -> list[int]:
    """As many tokens as are calibrated and judged on, of what Python says of itself.

    Fewer, if the model's tokenizer is none of the kind that is read here.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        _log.info("%s has no tokenizer that could be calibrated with: %s", folder.name, error)
        return []
    # Topics of every letter, not the first few over and over.
    names = sorted(topics)[:: len(topics) // TOPICS]
    text = "\n\n".join(topics[name][:TOPIC_CHARACTERS] for name in names)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids[: (CALIBRATED_ON + JUDGED_ON) * WINDOW]


def int8_units() -> bool:
    """Whether this processor multiplies bytes as fast as it can add (VNNI)."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "vnni" in flags.read_text()


def int8_if_as_good(
    model: PreTrainedModel,
    groups: Groups,
    text: Callable[[], Sequence[int]],
    *,
    window: int = WINDOW,
    kept: Kept | None = None,
) -> Quality | None:
    """Compute the model's layers in int8, unless it then answers worse.

    Args:
        model: float32, with its own attention.
        groups: layers to compute as one, from ``observed_groups``.
        text: tokens of one to calibrate on and, behind, of one to judge on.
        window: tokens that are read together, at most what the model can.
        kept: of an earlier start; what it does not know yet, it is told.

    Returns:
        What was judged; ``None``: there is too little text, or nothing to exchange.
    """
    found = kept.read() if kept is not None else None
    if found is None:
        found = _judged(model, groups, text(), window)
        if found is None:
            return None
        if kept is not None:
            kept.write(*found)
    calibration, quality = found
    if as_good(quality):
        to_int8(model, groups, calibration)
    return quality


def as_good(quality: Quality) -> bool:
    return quality.perplexity <= MOST_PERPLEXITY and quality.agreement >= LEAST_AGREEMENT


@torch.inference_mode()
def _judged(
    model: PreTrainedModel, groups: Groups, tokens: Sequence[int], window: int
) -> tuple[Calibration, Quality] | None:
    if len(tokens) < LEAST_TEXT:
        return None
    windows = [tokens[at : at + window] for at in range(0, len(tokens), window)]
    share = len(windows) * CALIBRATED_ON // (CALIBRATED_ON + JUDGED_ON)
    calibration = calibrated(model, windows[:share])
    if calibration is None:
        return None
    before = [_read(model, each) for each in windows[share:]]
    plain = to_int8(model, groups, calibration)
    try:
        return calibration, _compare(before, [_read(model, each) for each in windows[share:]])
    finally:
        put_back(plain)


@dataclass(frozen=True, slots=True)
class _Reading:
    surprise: float
    """Summed negative log likelihood of the tokens."""
    likeliest: torch.Tensor


def _read(model: PreTrainedModel, part: Sequence[int]) -> _Reading:
    tokens = torch.tensor([part])
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    surprise = nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
    return _Reading(float(surprise), logits.argmax(-1))


def _compare(before: Sequence[_Reading], after: Sequence[_Reading]) -> Quality:
    count = sum(len(reading.likeliest) for reading in before)
    more = sum(each.surprise for each in after) - sum(each.surprise for each in before)
    same = sum(
        int((one.likeliest == other.likeliest).sum())
        for one, other in zip(before, after, strict=True)
    )
    return Quality(perplexity=math.exp(more / count), agreement=same / count)
