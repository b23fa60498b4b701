"""In which precision a model computes on the CPU: int8, if it then answers as well.

The layers are calibrated on one text and judged on another, at load: how probable the text is to
the model (perplexity), and how often the likeliest next token stays the same. Both texts come with
Python. Of the output layer, which matters most, int8 only finds what float32 computes again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from deployments.engines.linears import Groups, PackedLinear, pack_linears, put_back

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


@dataclass(frozen=True, slots=True)
class Quality:
    """How a model in int8 stands to the same in float32."""

    perplexity: float
    """Of int8 : of float32."""
    agreement: float
    """Share of positions at which the likeliest next token is the same."""

    @property
    def kept(self) -> bool:
        return self.perplexity <= MOST_PERPLEXITY and self.agreement >= LEAST_AGREEMENT

    def __str__(self) -> str:
        return f"perplexity {self.perplexity - 1:+.2%}, the same next token in {self.agreement:.1%}"


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


@torch.inference_mode()
def to_int8(
    model: PreTrainedModel, groups: Groups, tokens: Sequence[int], window: int = WINDOW
) -> Quality | None:
    """Compute the model's layers in int8, unless it then answers worse.

    Args:
        model: float32, with its own attention.
        groups: layers to compute as one, from ``observed_groups``.
        tokens: of the text to calibrate on and, behind, that to judge on.
        window: tokens that are read together, at most what the model can.

    Returns:
        What was judged; ``None``: there is too little text, or nothing to exchange.
    """
    if len(tokens) < LEAST_TEXT:
        return None
    # Here, for Numba takes 70 MB, which whoever computes elsewhere does without.
    from deployments.engines.int8 import Int8Head, Int8Linear, observed_inputs, observed_ranges

    windows = [tokens[at : at + window] for at in range(0, len(tokens), window)]
    calibrated = len(windows) * CALIBRATED_ON // (CALIBRATED_ON + JUDGED_ON)
    calibration, judged = windows[:calibrated], windows[calibrated:]
    head = model.get_output_embeddings()
    with observed_ranges(model) as largest:
        with observed_inputs(head) as inputs:
            model(input_ids=torch.tensor([calibration[0]]), use_cache=False)
        for part in calibration[1:]:
            model(input_ids=torch.tensor([part]), use_cache=False, logits_to_keep=1)
    if not largest.keys() - {head}:
        return None
    before = [_read(model, part) for part in judged]

    def make(linears: Sequence[nn.Linear]) -> nn.Module:
        if linears[0] not in largest:
            return PackedLinear(*linears)
        if head in linears:
            return Int8Head(linears[0], inputs=torch.cat(inputs))
        return Int8Linear(*linears, largest=largest[linears[0]])

    plain = pack_linears(model, groups, make)
    quality = _compare(before, [_read(model, part) for part in judged])
    if not quality.kept:
        put_back(plain)
    return quality


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
