"""The objective on what is held out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from train.recipes.llm.data import tokens
from train.recipes.llm.encoding import Unit
from train.recipes.llm.objective import Objective, Row
from train.recipes.llm.packing import groups, pack
from train.recipes.llm.parallel import Group


@torch.no_grad()
def evaluate(
    objective: Objective,
    units: Sequence[Unit],
    *,
    limit: int,
    micro: int,
    group: Group,
    device: torch.device,
) -> dict[str, float]:
    """Means over all units, as each worker knows them: ``loss`` and what else there is."""
    packed = pack(range(len(units)), [tokens(unit) for unit in units], limit)
    passes = groups(packed, micro)
    was_training = objective.training
    objective.eval()
    sums: dict[str, float] = {}
    for sequences, counts in group.share(passes):
        indexes = [i for sequence in sequences for i in sequence]
        result = objective(Row.of([units[i] for i in indexes], device))
        for name, value in result.items():
            sums[name] = sums.get(name, 0.0) + (float(value) if counts else 0.0)
    objective.train(was_training)
    weight = objective.weigh(units)
    return {name: total / weight for name, total in group.sum(sums).items()}


def named(
    result: Mapping[str, float], base: Mapping[str, float], *, of_tokens: bool
) -> dict[str, float]:
    """As reported, beside what ``base``, the untrained model, has: ``eval_loss``,
    ``base_loss``, and perplexities where the loss is of tokens.
    """
    metrics = {f"eval_{name}": value for name, value in result.items()}
    metrics["base_loss"] = base["loss"]
    if of_tokens:
        metrics["perplexity"] = _exp(result["loss"])
        metrics["base_perplexity"] = _exp(base["loss"])
        metrics["perplexity_ratio"] = _exp(result["loss"] - base["loss"])
    return metrics


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
