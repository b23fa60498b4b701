from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models.predictors import image
from train.recipes.compression.distillation import Hints, lower_bound, student

SMALL = image.Architecture(channels=(2, 2), hidden=4)
PIXELS = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % 10


def taught(teacher: nn.Module | None, hints: Hints, epochs: int = 2) -> dict[str, torch.Tensor]:
    answers = None
    if teacher is not None:
        with torch.no_grad():
            answers = teacher(PIXELS)
    net = student(
        image.build(SMALL, seed=1),
        PIXELS,
        LABELS,
        answers,
        hints=hints,
        epochs=epochs,
        learning_rate=0.01,
        seed=7,
    )
    return net.state_dict()


def test_a_student_that_ignores_its_teacher_is_its_twin() -> None:
    teacher = image.build(SMALL, seed=5)
    deaf = taught(teacher, Hints(temperature=3.0, weight=0.0))
    alone = taught(None, Hints(temperature=3.0, weight=0.5))
    assert all(torch.equal(deaf[name], alone[name]) for name in alone)
    listening = taught(teacher, Hints(temperature=3.0, weight=0.5))
    assert any(not torch.equal(listening[name], alone[name]) for name in alone)


def test_a_student_with_hints_alone_comes_to_answer_like_its_teacher() -> None:
    teacher = image.build(SMALL, seed=5).eval()
    with torch.no_grad():
        teacher[-1].bias[3] += 2  # an opinion that no label has
    net = image.build(SMALL)
    net.load_state_dict(taught(teacher, Hints(temperature=1.0, weight=1.0), epochs=100))
    with torch.no_grad():
        assert (net(PIXELS).argmax(1) == 3).double().mean() > 0.9


def test_the_lower_bound_is_student_t() -> None:
    assert lower_bound([1.0, 2.0, 3.0]) == pytest.approx(2 - 2.919986 / math.sqrt(3), abs=1e-5)
    assert lower_bound([5.0]) == -math.inf
