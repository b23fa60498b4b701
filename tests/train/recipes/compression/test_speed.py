from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.recipes.compression import speed
from train.recipes.compression.speed import Speed

MATRIX = torch.rand(100, 100)


def work(times: int) -> Callable[[Tensor], None]:
    def way(batch: Tensor) -> None:
        for _ in range(times * len(batch)):
            MATRIX @ MATRIX

    return way


def test_ten_times_the_work_is_seen_from_both_sides() -> None:
    threads = torch.get_num_threads()
    pixels = torch.zeros(32, 1)
    gained = speed.compare({"much": work(10), "little": work(1)}, pixels, rounds=9)
    lost = speed.compare({"little": work(1), "much": work(10)}, pixels, rounds=9)
    assert gained.keys() == lost.keys() == {1, 32}
    for size in gained:
        assert gained[size]["much"].ratio == lost[size]["little"].ratio == 1
        assert gained[size]["little"].ratio > 3
        assert lost[size]["much"].ratio < 1 / 3
    assert torch.get_num_threads() == threads


def test_what_counts_is_where_it_gains_least(tmp_path: Path) -> None:
    table = {
        1: {"net": Speed(median_us=90.0, ratio=1.0), "small": Speed(median_us=30.0, ratio=3.0)},
        32: {"net": Speed(median_us=900.0, ratio=1.0), "small": Speed(median_us=600.04, ratio=1.5)},
    }
    assert speed.slowest(table, "small") == 1.5
    speed.write(table, tmp_path / "speed.json")
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["batch_32"]["small"] == {"median_us": pytest.approx(600.0), "ratio": 1.5}
