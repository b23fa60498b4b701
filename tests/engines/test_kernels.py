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

from deployments.engines import kernels
from deployments.engines.int8 import Rows
from deployments.engines.kernels import Floats

widths = st.sampled_from([1, 2, 7, 16, 33, 64, 100])
sizes = st.tuples(st.integers(1, 9), widths, st.integers(0, 99))


def meant(rows: Rows) -> NDArray[np.float64]:
    """What rows in int8 stand for."""
    whole = rows.tensor.numpy().astype(np.float64)
    return whole * rows.steps[0][:, None] + rows.steps[1][:, None]


def assert_near(rows: Rows, exact: torch.Tensor) -> None:
    off = np.abs(meant(rows) - exact.double().numpy())
    digits = 1e-5 * exact.abs().amax(1, keepdim=True).numpy()  # of a float
    assert (off <= rows.steps[0][:, None] / 2 + digits + 1e-7).all()


@dataclass(frozen=True, slots=True)
class Case:
    """A product in int32, and what it stands for."""

    product: NDArray[np.int32]
    steps: Floats
    terms: Floats

    @classmethod
    def of(cls, count: int, width: int) -> Case:
        scale, sums, bias = torch.rand(width) * 1e-3, torch.randn(width), torch.randn(width)
        return cls(
            torch.randint(-3000, 3000, (count, width), dtype=torch.int32).numpy(),
            torch.stack([torch.rand(count), torch.randn(count)]).numpy(),
            torch.stack([scale, sums, bias]).numpy(),
        )

    @property
    def y(self) -> torch.Tensor:
        scale, sums, bias = self.terms
        step, base = self.steps[:, :, None]
        return torch.from_numpy(self.product * np.float64(step) * scale + base * sums + bias)


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
    kernels.quantise_int8(x.numpy(), gain, rows.array, rows.steps)
    assert_near(rows, x * torch.from_numpy(gain))


@given(size=sizes)
def test_normalised(size: tuple[int, int, int]) -> None:
    count, width, seed = size
    x, gain = drawn(count, width, seed)
    rows, y = Rows(count, width), np.empty((count, width), np.float32)
    kernels.normalise_int8(x.numpy(), gain, 1e-5, rows.array, rows.steps)
    kernels.normalise(x.numpy(), gain, 1e-5, y)
    exact = rms_norm(x.double(), (width,), torch.from_numpy(gain).double(), 1e-5)
    assert_near(rows, exact)
    assert np.allclose(y, exact, rtol=1e-5, atol=1e-7)


@given(size=sizes)
def test_gated(size: tuple[int, int, int]) -> None:
    count, width, seed = size
    _, gain = drawn(count, width, seed)
    case, rows = Case.of(count, 2 * width), Rows(count, width)
    kernels.gate_int8(case.product, case.steps, case.terms, gain, rows.array, rows.steps)
    a, b = case.y[:, :width], case.y[:, width:]
    assert_near(rows, silu(a) * b * torch.from_numpy(gain))


@given(size=sizes)
def test_gated_in_floats(size: tuple[int, int, int]) -> None:
    count, width, seed = size
    product, y = drawn(count, 2 * width, seed)[0], np.empty((count, width), np.float32)
    kernels.gate(product.numpy(), y)
    exact = silu(product[:, :width].double()) * product[:, width:]
    assert np.allclose(y, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("a", [-1e9, -200.0, -87.5, -1.0, 0.0, 1e-20, 1.0, 87.5, 200.0, 1e9])
def test_a_gate_is_open_or_shut_however_far_it_goes(a: float) -> None:
    rows, one, none = Rows(1, 1), np.ones(2, np.float32), np.zeros(2, np.float32)
    product, y = np.zeros((1, 2), np.int32), np.empty((1, 1), np.float32)
    terms, steps = np.stack([one, none, np.float32([a, 1.0])]), np.stack([one[:1], none[:1]])
    kernels.gate_int8(product, steps, terms, one[:1], rows.array, rows.steps)
    kernels.gate(terms[2:], y)
    exact = pytest.approx(float(silu(torch.tensor(a))), rel=1e-6, abs=1e-7)
    assert meant(rows).item() == exact
    assert y.item() == exact


@given(size=sizes)
def test_back_in_floats(size: tuple[int, int, int]) -> None:
    count, width, seed = size
    before, _ = drawn(count, width, seed)
    case, y = Case.of(count, width), before.numpy().copy()
    exact = case.y
    kernels.add_int8(case.product, case.steps, case.terms, y)
    kernels.dequantise(case.product, case.steps, case.terms)
    assert np.allclose(case.product.view(np.float32), exact, atol=1e-5)
    assert np.allclose(y, before + exact, atol=1e-4, rtol=1e-5)
    kernels.add(case.product.view(np.float32), y)
    assert np.allclose(y, before + 2 * exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (9, 3, 64), (1, 1, 2)])
def test_turned_and_in_their_places(heads: int, kv_heads: int, dim: int, int8: bool) -> None:
    torch.manual_seed(0)
    places = torch.tensor([7, 0, 12])
    angles = torch.rand(3, dim) * 6
    case = Case.of(3, (heads + 2 * kv_heads) * dim)
    query = np.empty((3, heads, dim), np.float32)
    keys, values = (np.full((13, kv_heads, dim), 5, np.float32) for _ in range(2))
    written = (query, keys, values, places.numpy())
    turn = (angles.cos().numpy(), angles.sin().numpy(), *written)
    if int8:
        kernels.rotate_and_place_int8(case.product, case.steps, case.terms, *turn)
    else:
        kernels.rotate_and_place(case.y.float().numpy(), *turn)
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
            kernels.quantise_int8(x.numpy(), gain, rows.array, rows.steps)
        case "normalise":
            kernels.normalise_int8(x.numpy(), gain, 1e-5, rows.array, rows.steps)
        case _:
            case = Case.of(4, 66)
            case.steps[0, 2] = odd
            kernels.gate_int8(case.product, case.steps, case.terms, gain, rows.array, rows.steps)
    assert np.isnan(rows.steps[0]).tolist() == [False, False, True, False]
    assert np.isnan(meant(rows)[2]).all()


def test_what_is_not_finite_in_floats_is_of_its_row_alone() -> None:
    x, gain = drawn(4, 34, 0)
    x[2, 17] = float("nan")
    normalised, gated = np.empty((4, 34), np.float32), np.empty((4, 17), np.float32)
    kernels.normalise(x.numpy(), gain, 1e-5, normalised)
    kernels.gate(x.numpy(), gated)
    assert np.isnan(normalised).all(1).tolist() == [False, False, True, False]
    assert np.isnan(gated).any(1).tolist() == [False, False, True, False]
    assert np.isfinite(normalised).sum() == 3 * 34
