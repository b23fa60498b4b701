"""The function is the published one."""

from __future__ import annotations

import math

import pytest

from train.recipes.branin import branin


def test_branin_has_its_three_published_minima() -> None:
    for x, y in ((-math.pi, 12.275), (math.pi, 2.275), (9.42478, 2.475)):
        assert branin(x, y) == pytest.approx(0.397887, abs=1e-5)
        for dx, dy in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):
            assert branin(x + dx, y + dy) > 0.397887
