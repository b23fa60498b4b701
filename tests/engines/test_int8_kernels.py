"""Each kernel is what a few lines of torch say, up to half a step of what is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn.functional import rms_norm, silu

from deployments.engines import int8_kernels as kernels
from deployments.engines.int8 import Rows
from deployments.engines.int8_kernels import Floats

widths = st.sampled_from([1, 2, 7, 16, 33, 64, 100])
sizes = st.tuples(st.integers(1, 9), widths, st.integers(0, 99))


def meant(rows: Rows) -> NDArray[np.float64]:
    """What rows in int8 stand for."""
    whole = rows.tensor.numpy().astype(np.float64)
    return whole * rows.step[:, None] + rows.base[:, None]


def assert_near(rows: Rows, exact: torch.Tensor) -> None:
    off = np.abs(meant(rows) - exact.double().numpy())
    digits = 1e-5 * exact.abs().amax(1, keepdim=True).numpy()  # of a float
    assert (off <= rows.step[:, None] / 2 + digits + 1e-7).all()


@dataclass(frozen=True, slots=True)
class Case:
    """A product in int32, and what it stands for."""

    product: NDArray[np.int32]
    step: Floats
    base: Floats
    terms: tuple[Floats, Floats, Floats]

    @classmethod
    def of(cls, count: int, width: int) -> Case:
        scale, sums, bias = torch.rand(width) * 1e-3, torch.randn(width), torch.randn(width)
        return cls(
            torch.randint(-3000, 3000, (count, width), dtype=torch.int32).numpy(),
            torch.rand(count).numpy(),
            torch.randn(count).numpy(),
            (scale.numpy(), sums.numpy(), bias.numpy()),
        )

    @property
    def y(self) -> torch.Tensor:
        scale, sums, bias = self.terms
        exact = self.product * np.float64(self.step[:, None]) * scale
        return torch.from_numpy(exact + self.base[:, None] * sums + bias)


def drawn(count: int, width: int, seed: int) -> tuple[torch.Tensor, Floats]:
    """An input of channels as unlike as those of language models, and a gain."""
    torch.manual_seed(seed)
    x = torch.randn(count, width) * torch.randn(width).exp() + torch.randn(width)
    return x, (torch.rand(width) + 0.5).numpy()


@given(size=sizes)
def test_rounded(size: tuple[int, int, int]) -> None:
    count, width, seed = size
    x, gain = drawn(count, width, seed)
    rows = Rows(count, width)
    kernels.quantise(x.numpy(), gain, *rows.parts)
    assert_near(rows, x * torch.from_numpy(gain))


@given(size=sizes)
def test_normalised(size: tuple[int, int, int]) -> None:
    count, width, seed = size
    x, gain = drawn(count, width, seed)
    rows = Rows(count, width)
    kernels.normalise(x.numpy(), gain, 1e-5, *rows.parts)
    assert_near(rows, rms_norm(x.double(), (width,), torch.from_numpy(gain).double(), 1e-5))


@given(size=sizes)
def test_gated(size: tuple[int, int, int]) -> None:
    count, width, seed = size
    _, gain = drawn(count, width, seed)
    case, rows = Case.of(count, 2 * width), Rows(count, width)
    kernels.gate(case.product, case.step, case.base, *case.terms, gain, *rows.parts)
    a, b = case.y[:, :width], case.y[:, width:]
    assert_near(rows, silu(a) * b * torch.from_numpy(gain))


@pytest.mark.parametrize("a", [-1e9, -200.0, -87.5, -1.0, 0.0, 1e-20, 1.0, 87.5, 200.0, 1e9])
def test_a_gate_is_open_or_shut_however_far_it_goes(a: float) -> None:
    rows, one, none = Rows(1, 1), np.ones(2, np.float32), np.zeros(2, np.float32)
    product, bias = np.zeros((1, 2), np.int32), np.float32([a, 1.0])
    kernels.gate(product, one[:1], none[:1], one, none, bias, one[:1], *rows.parts)
    assert meant(rows).item() == pytest.approx(float(silu(torch.tensor(a))), rel=1e-6, abs=1e-7)


@given(size=sizes)
def test_back_in_floats(size: tuple[int, int, int]) -> None:
    count, width, seed = size
    before, _ = drawn(count, width, seed)
    case, y = Case.of(count, width), before.numpy().copy()
    exact = case.y
    kernels.add(case.product, case.step, case.base, *case.terms, y)
    kernels.dequantise(case.product, case.step, case.base, *case.terms)
    assert np.allclose(case.product.view(np.float32), exact, atol=1e-5)
    assert np.allclose(y, before + exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (9, 3, 64), (1, 1, 2)])
def test_turned_and_in_their_places(heads: int, kv_heads: int, dim: int) -> None:
    torch.manual_seed(0)
    places = torch.tensor([7, 0, 12])
    angles = torch.rand(3, dim) * 6
    case = Case.of(3, (heads + 2 * kv_heads) * dim)
    query = np.empty((3, heads, dim), np.float32)
    keys, values = (np.full((13, kv_heads, dim), 5, np.float32) for _ in range(2))
    kernels.rotate_and_place(
        case.product,
        case.step,
        case.base,
        *case.terms,
        angles.cos().numpy(),
        angles.sin().numpy(),
        query,
        keys,
        values,
        places.numpy(),
    )
    parts = case.y.view(3, heads + 2 * kv_heads, dim)
    halves = torch.cat((-parts[..., dim // 2 :], parts[..., : dim // 2]), -1)
    turned = parts * angles.cos()[:, None] + halves * angles.sin()[:, None]
    assert np.allclose(query, turned[:, :heads], atol=1e-5)
    assert np.allclose(keys[places], turned[:, heads : heads + kv_heads], atol=1e-5)
    assert np.allclose(values[places], parts[:, heads + kv_heads :], atol=1e-5)
    untouched = sorted(set(range(13)) - set(places.tolist()))
    assert (keys[untouched] == 5).all()
    assert (values[untouched] == 5).all()


@pytest.mark.parametrize("odd", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernel", ["quantise", "normalise", "gate"])
def test_what_is_not_finite_is_of_its_row_alone(kernel: str, odd: float) -> None:
    """A sequence that breaks ends alone: its logits are NaN, and no other's."""
    x, gain = drawn(4, 33, 0)
    x[2, 17] = odd
    rows = Rows(4, 33)
    match kernel:
        case "quantise":
            kernels.quantise(x.numpy(), gain, *rows.parts)
        case "normalise":
            kernels.normalise(x.numpy(), gain, 1e-5, *rows.parts)
        case _:
            case = Case.of(4, 66)
            case.step[2] = odd
            kernels.gate(case.product, case.step, case.base, *case.terms, gain, *rows.parts)
    assert np.isnan(rows.step).tolist() == [False, False, True, False]
    assert np.isnan(meant(rows)[2]).all()
