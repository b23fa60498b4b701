"""Digits-5k."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from models.errors import ConfigError
from train.data import digits


def test_the_split_is_fixed_and_balanced() -> None:
    data = digits.load()
    assert data.train_images.shape == (4000, 28, 28)
    assert data.test_images.shape == (1000, 28, 28)
    assert np.bincount(data.train_labels).tolist() == [400] * 10
    assert np.bincount(data.test_labels).tolist() == [100] * 10
    assert data.train_images.max() == 255
    together = {image.tobytes() for image in (*data.train_images, *data.test_images)}
    assert len(together) == 5000
    # Of this very split, so that a changed generator is noticed.
    assert data.test_labels[:12].tolist() == [1, 8, 2, 4, 4, 6, 8, 2, 7, 2, 3, 1]


def test_to_choose_by_there_is_a_part_of_what_is_learned_from() -> None:
    whole, data = digits.load(), digits.load("validation")
    assert (len(data.train_images), len(data.test_images)) == (3200, 800)
    again = np.concatenate([data.train_images, data.test_images])
    assert np.array_equal(again, whole.train_images), "each once, and none of the test images"
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert np.array_equal(labels, whole.train_labels)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress(b"0,1\n"))
    with pytest.raises(ConfigError, match="is not the file that Digits-5k was made from"):
        digits._load(path)
