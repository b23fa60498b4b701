"""Each kernel is what a few lines of torch say, up to half a step of what is rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from deployments.engines import kernels
from deployments.engines.int8 import Rows
from deployments.engines.kernels import Floats

widths = st.sampled_from([1, 2, 7, 16, 33, 64, 100])
sizes = st.tuples(st.integers(1, 9), widths, st.integers(0, 99))
bits = pytest.mark.parametrize("bits", [8, 16])


def joined(array: NDArray[np.int8] | NDArray[np.int32], count: int) -> NDArray[np.float64]:
    """Rows of 16 bits are given as their high bytes and, behind them, the low ones."""
    high, low = array[:count].astype(np.float64), array[count:]
    return high * 256 + low if len(low) else high


def meant(rows: Rows) -> NDArray[np.float64]:
    """What rows in int8 stand for."""
    whole = joined(rows.array, rows.steps.shape[1])
    return whole * np.float64(rows.steps[0])[:, None] + rows.steps[1][:, None]


def assert_near(rows: Rows, exact: torch.Tensor, lost: float | NDArray[Any] = 0.0) -> None:
    """Up to half a step, and ``lost``."""
    off = np.abs(meant(rows) - exact.double().numpy())
    digits = 1e-5 * exact.abs().amax(1, keepdim=True).numpy()  # of a float
    assert (off <= rows.steps[0][:, None] / 2 + digits + 1e-7 + lost).all()


@dataclass(frozen=True, slots=True)
class Case:
    """A product in int32, and what it stands for."""

    product: NDArray[np.int32]
    steps: Floats
    terms: Floats

    @classmethod
    def of(cls, count: int, width: int, bits: int = 8) -> Case:
        scale, sums, bias = torch.rand(width) * 1e-3, torch.randn(width), torch.randn(width)
        return cls(
            torch.randint(-3000, 3000, (bits // 8 * count, width), dtype=torch.int32).numpy(),
            torch.stack(
                [torch.rand(count) / (1 if bits == 8 else 256), torch.randn(count)]
            ).numpy(),
            torch.stack([scale, sums, bias]).numpy(),
        )

    @property
    def y(self) -> torch.Tensor:
        scale, sums, bias = self.terms
        step, base = self.steps[:, :, None]
        product = joined(self.product, len(step))
        return torch.from_numpy(product * np.float64(step) * scale + base * sums + bias)


def drawn(count: int, width: int, seed: int) -> tuple[torch.Tensor, Floats]:
    """An input of channels as unlike as those of language models, and a gain."""
    torch.manual_seed(seed)
    x = torch.randn(count, width) * torch.randn(width).exp() + torch.randn(width)
    return x, (torch.rand(width) + 0.5).numpy()


@bits
@given(size=sizes)
def test_rounded(bits: int, size: tuple[int, int, int]) -> None:
    count, width, seed = size
    x, gain = drawn(count, width, seed)
    rows = Rows(count, width, bits)
    kernels.quantise_int8(x.numpy(), gain, rows.array, rows.steps)
    assert_near(rows, x * torch.from_numpy(gain))


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@bits
@given(size=sizes)
def test_normalised(bits: int, centred: bool, size: tuple[int, int, int]) -> None:
    count, width, seed = size
    x, gain = drawn(count, width, seed)
    rows, y = Rows(count, width, bits), np.empty((count, width), np.float32)
    more, shift = gain[::-1].copy(), (gain - 1) * centred
    by = (gain, shift, 1e-5, centred)
    kernels.normalise_int8(x.numpy(), *by, more, rows.array, rows.steps)
    kernels.normalise(x.numpy(), *by, y)
    weight, bias = (torch.from_numpy(each).double() for each in (gain, shift))
    if centred:
        exact = layer_norm(x.double(), (width,), weight, bias, 1e-5)
    else:
        exact = rms_norm(x.double(), (width,), weight, 1e-5)
    # Nearly equal numbers lose digits where their mean is taken away.
    lost = (
        2e-6 * x.abs().amax(1, keepdim=True) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    )
    lost = (lost * torch.from_numpy(gain).abs()).numpy() * centred
    assert_near(rows, exact * torch.from_numpy(more), lost * np.abs(more))
    assert (np.abs(y - exact.numpy()) <= 1e-5 * np.abs(exact.numpy()) + 1e-6 + lost).all()


def active(product: torch.Tensor, gated: bool) -> torch.Tensor:
    if not gated:
        return gelu(product, approximate="tanh")
    a, b = product.chunk(2, -1)
    return silu(a) * b


gatings = pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])


@gatings
@bits
@given(size=sizes)
def test_activated(bits: int, gated: bool, size: tuple[int, int, int]) -> None:
    count, width, seed = size
    _, gain = drawn(count, width, seed)
    case, rows = Case.of(count, (1 + gated) * width, bits), Rows(count, width, bits)
    given = (case.product, case.steps, case.terms)
    kernels.activate_int8(*given, gated, gain, rows.array, rows.steps)
    assert_near(rows, active(case.y, gated) * torch.from_numpy(gain))


@gatings
@given(size=sizes)
def test_activated_in_floats(gated: bool, size: tuple[int, int, int]) -> None:
    count, width, seed = size
    product, y = drawn(count, (1 + gated) * width, seed)[0], np.empty((count, width), np.float32)
    kernels.activate(product.numpy(), gated, y)
    assert np.allclose(y, active(product.double(), gated), rtol=1e-5, atol=1e-6)


@gatings
@pytest.mark.parametrize("a", [-1e9, -200.0, -87.5, -1.0, 0.0, 1e-20, 1.0, 87.5, 200.0, 1e9])
def test_a_gate_is_open_or_shut_however_far_it_goes(a: float, gated: bool) -> None:
    outputs = 1 + gated
    rows, one, none = Rows(1, 1), np.ones(outputs, np.float32), np.zeros(outputs, np.float32)
    product, y = np.zeros((1, outputs), np.int32), np.empty((1, 1), np.float32)
    bias = np.array([[a, 1.0][:outputs]], np.float32)
    terms, steps = np.stack([one, none, bias[0]]), np.stack([one[:1], none[:1]])
    kernels.activate_int8(product, steps, terms, gated, one[:1], rows.array, rows.steps)
    kernels.activate(bias, gated, y)
    exact = pytest.approx(float(active(torch.from_numpy(bias).double(), gated)), rel=1e-6, abs=1e-7)
    assert meant(rows).item() == exact
    assert y.item() == exact


@bits
@given(size=sizes)
def test_back_in_floats(bits: int, size: tuple[int, int, int]) -> None:
    count, width, seed = size
    before, _ = drawn(count, width, seed)
    case, y = Case.of(count, width, bits), before.numpy().copy()
    exact = case.y
    kernels.add_int8(case.product, case.steps, case.terms, y)
    kernels.dequantise(case.product, case.steps, case.terms)
    floats = case.product[:count].view(np.float32)
    assert np.allclose(floats, exact, atol=1e-5)
    assert np.allclose(y, before + exact, atol=1e-4, rtol=1e-5)
    kernels.add(floats, y)
    assert np.allclose(y, before + 2 * exact, atol=1e-4, rtol=1e-5)


@bits
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (9, 3, 64), (1, 1, 2)])
def test_turned_and_in_their_places(
    heads: int, kv_heads: int, dim: int, int8: bool, bits: int
) -> None:
    torch.manual_seed(0)
    places = torch.tensor([7, 0, 12])
    angles = torch.rand(3, dim) * 6
    case = Case.of(3, (heads + 2 * kv_heads) * dim, bits)
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


@bits
@pytest.mark.parametrize("odd", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernel", ["quantise", "normalise", "gate"])
def test_what_is_not_finite_is_of_its_row_alone(kernel: str, odd: float, bits: int) -> None:
    """A sequence that breaks ends alone: its logits are NaN, and no other's."""
    x, gain = drawn(4, 33, 0)
    x[2, 17] = odd
    rows = Rows(4, 33, bits)
    match kernel:
        case "quantise":
            kernels.quantise_int8(x.numpy(), gain, rows.array, rows.steps)
        case "normalise":
            none = np.zeros_like(gain)
            by = (gain, none, 1e-5, False, gain)
            kernels.normalise_int8(x.numpy(), *by, rows.array, rows.steps)
        case _:
            case = Case.of(4, 66)
            case.steps[0, 2] = odd
            given = (case.product, case.steps, case.terms)
            kernels.activate_int8(*given, True, gain, rows.array, rows.steps)
    assert np.isnan(rows.steps[0]).tolist() == [False, False, True, False]
    assert np.isnan(meant(rows)[2]).all()


def test_what_is_not_finite_in_floats_is_of_its_row_alone() -> None:
    x, gain = drawn(4, 34, 0)
    x[2, 17] = float("nan")
    normalised, gated = np.empty((4, 34), np.float32), np.empty((4, 17), np.float32)
    kernels.normalise(x.numpy(), gain, np.zeros_like(gain), 1e-5, False, normalised)
    kernels.activate(x.numpy(), True, gated)
    assert np.isnan(normalised).all(1).tolist() == [False, False, True, False]
    assert np.isnan(gated).any(1).tolist() == [False, False, True, False]
    assert np.isfinite(normalised).sum() == 3 * 34
