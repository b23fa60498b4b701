"""What ``vision`` learns from, and what it is judged on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.predictors import image
from train.context import Context
from train.data import digits
from train.recipes.vision import Vision, run


@pytest.mark.parametrize("part", ["test", "validation"])
def test_nothing_is_judged_on_what_was_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    seen = []

    def pixels(images: np.ndarray) -> object:
        seen.append(images)
        return kept(images)

    kept = image.pixels
    monkeypatch.setattr(image, "pixels", pixels)
    context = Context(out=tmp_path, on_report=lambda report, save: None)
    config = Vision.model_validate({"epochs": 1, "train_images": 3900, "part": part})
    metrics = run(config, context)
    learned, judged = seen
    assert (len(learned), len(judged)) == ((3900, 1000) if part == "test" else (3200, 800))
    assert metrics["accuracy"] > 0.5
    whole = digits.load()
    source = whole.test_images if part == "test" else whole.train_images
    assert {each.tobytes() for each in judged} <= {each.tobytes() for each in source}
    assert not {each.tobytes() for each in judged} & {each.tobytes() for each in learned}
