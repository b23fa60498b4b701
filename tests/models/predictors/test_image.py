"""The image classifier."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError, InvalidInput
from models.predictors import image

SMALL = image.Architecture(channels=(2, 3), hidden=4, classes=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image.save(tmp_path, image.build(SMALL, seed=1), SMALL)
    return tmp_path


def picture(seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=784)


def rows(flat: list[int]) -> list[list[int]]:
    return [flat[start : start + 28] for start in range(0, 784, 28)]


def test_an_architecture_is_built_from_its_seed_alone() -> None:
    import torch

    one, same, other = (image.build(SMALL, seed=seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert image.architecture_of(one) == SMALL
    default = image.build(image.ARCHITECTURE)
    assert sum(weight.numel() for weight in default.parameters()) == 105_866


def test_probabilities_and_the_likeliest_label(folder: Path) -> None:
    predictor = image.load(folder)
    flat = [picture(seed) for seed in range(3)]
    answers: list[Any] = predictor.predict_batch([flat[0], rows(flat[1]), flat[2]])
    assert answers == predictor.predict_batch([rows(flat[0]), flat[1], rows(flat[2])])
    for answer in answers:
        assert sum(answer["probabilities"]) == pytest.approx(1)
        likeliest = max(range(3), key=answer["probabilities"].__getitem__)
        assert answer["label"] == likeliest
    assert predictor.predict_batch([]) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (None, "not NoneType"),
        ({"pixels": []}, "not dict"),
        ([], "has 0 values"),
        ([1] * 783, "has 783 values"),
        ([[1] * 28] * 27, "another size"),
        ([[1] * 27] * 28, "another size"),
        ([[1] * 28] * 27 + [[1] * 27 + ["x"]], "'x' is not a grey value"),
        ([*[0] * 783, 256], "256 is not a grey value"),
        ([*[0] * 783, -1], "-1 is not"),
        ([*[0] * 783, float("nan")], "nan is not"),
        ([*[0] * 783, True], "True is not"),
        ([*[0] * 783, [0]], r"\[0\] is not"),
    ],
)
def test_what_is_no_picture(bad: Any, says: str, folder: Path) -> None:
    predictor = image.load(folder)
    with pytest.raises(InvalidInput, match=says) as told:
        predictor.predict_batch([picture(0), bad])
    assert told.value.details == {"index": 1}


def test_files_that_do_not_fit(folder: Path) -> None:
    other = image.Architecture(channels=(2,), hidden=4, classes=3)
    weights = (folder / image.WEIGHTS).read_bytes()
    image.save(folder, image.build(other), other)
    (folder / image.WEIGHTS).write_bytes(weights)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not of model\.json"):
        image.load(folder)
    (folder / image.ARCHITECTURE_FILE).write_text('{"channels": [2], "colour": true}')
    with pytest.raises(ConfigError, match="cannot be used"):
        image.load(folder)
