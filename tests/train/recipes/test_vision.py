"""What ``vision`` is judged on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.predictors import image
from train.context import Context
from train.data import Part, digits
from train.recipes.vision import Vision, run


@pytest.mark.parametrize(("part", "others"), [("test", "validation"), ("validation", "test")])
def test_it_is_judged_on_the_part_that_is_asked_for(
    tmp_path: Path, part: Part, others: Part
) -> None:
    context = Context(out=tmp_path, on_report=lambda report, save: None)
    accuracy = run(Vision(epochs=1, train_images=500, part=part), context)["accuracy"]
    assert accuracy == pytest.approx(measured(context.artifact, part), abs=1e-9)
    assert accuracy != pytest.approx(measured(context.artifact, others), abs=1e-9)


def measured(artifact: Path, part: Part) -> float:
    data, net = digits.load(part), image.read(artifact)
    with torch.inference_mode():
        found = net(image.pixels(data.test_images)).argmax(1)
    return float((found == torch.tensor(data.test_labels)).double().mean())
