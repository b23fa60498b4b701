from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from train.recipes.compression.fit import moved


@given(st.integers(0, 3), st.integers(0, 1000))
def test_images_move_whole_and_by_no_more_than_allowed(most: int, seed: int) -> None:
    pixels = torch.zeros(6, 1, 9, 11)
    pixels[:, 0, 4, 5] = torch.arange(1.0, 7.0)
    found = moved(pixels, most, torch.Generator().manual_seed(seed))
    assert found.shape == pixels.shape
    assert found.sum((1, 2, 3)).tolist() == [1, 2, 3, 4, 5, 6]
    for one in found[:, 0]:
        ((row, column),) = one.nonzero().tolist()
        assert abs(row - 4) <= most
        assert abs(column - 5) <= most


def test_each_image_moves_by_itself() -> None:
    pixels = torch.zeros(50, 1, 9, 9)
    pixels[:, 0, 4, 4] = 1
    found = moved(pixels, 1, torch.Generator().manual_seed(0))
    assert len({tuple(one.nonzero()[0].tolist()) for one in found[:, 0]}) == 9
