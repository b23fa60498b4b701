"""A small student of a large teacher, beside the same small network that had no teacher."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.recipes.compression.fit import fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """How much a student listens to its teacher's soft answers (Hinton, Vinyals, Dean 2015)."""

    temperature: float
    weight: float
    """Of the soft answers, against the labels."""


def student(
    build: Callable[[int], nn.Module],
    teacher: nn.Module | None,
    pixels: Tensor,
    labels: Tensor,
    *,
    hints: Hints,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> nn.Module:
    """Train ``build(seed)``. Without a teacher everything else is the same: first weights, batches,
    shifts and steps.
    """

    def loss(logits: Tensor, batch: Tensor, truth: Tensor) -> Tensor:
        hard = functional.cross_entropy(logits, truth)
        if teacher is None:
            return hard
        with torch.no_grad():
            soft = functional.log_softmax(teacher(batch) / hints.temperature, 1)
        mine = functional.log_softmax(logits / hints.temperature, 1)
        far = functional.kl_div(mine, soft, reduction="batchmean", log_target=True)
        return (1 - hints.weight) * hard + hints.weight * hints.temperature**2 * far

    net = build(seed)
    fit(net, pixels, labels, loss, epochs=epochs, learning_rate=learning_rate, seed=seed)
    return net


def lower_bound(differences: Sequence[float]) -> float:
    """Of the mean, with 95 % confidence (one-sided, Student's t); -inf for a single one."""
    if len(differences) < 2:
        return -math.inf
    from scipy.stats import t

    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) - float(t.ppf(0.95, len(differences) - 1)) * error
