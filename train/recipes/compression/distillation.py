"""A small student of a large teacher, beside the same small network that had no teacher.

What a teacher knows more than the labels say counts where labels are few: see
``docs/decisions.md``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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
    net: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    answers: Tensor | None,
    *,
    hints: Hints,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> nn.Module:
    """Train ``net``. Without ``answers`` everything but the loss is the same: images, order, steps.

    Args:
        answers: the teacher's logits for the images, or ``None`` if there is no teacher.
    """
    warmth = hints.temperature
    soft = None if answers is None else functional.log_softmax(answers / warmth, 1)

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        hard = functional.cross_entropy(logits, labels[rows])
        if soft is None:
            return hard
        mine = functional.log_softmax(logits / warmth, 1)
        far = functional.kl_div(mine, soft[rows], reduction="batchmean", log_target=True)
        return (1 - hints.weight) * hard + hints.weight * warmth**2 * far

    fit(
        net,
        pixels,
        loss,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        batch_size=32,
        shift=0,
    )
    return net


def lower_bound(differences: Sequence[float]) -> float:
    """Of the mean, with 95 % confidence (one-sided, Student's t); -inf for a single one."""
    if len(differences) < 2:
        return -math.inf
    from scipy.stats import t

    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) - float(t.ppf(0.95, len(differences) - 1)) * error
