"""What lies between a model's products, each in one pass over its rows (Numba).

Between two products of a few rows torch needs some ten small operations, whose calls take about as
long as the products; here it is one call of some microseconds.

Everywhere ``[rows, width]``, C-contiguous. A row ``x`` in int8 is ``step · whole + base``; the
product with a weight in int8 (``scale · weights``, one scale for each output) is then
``(whole · weights) · step · scale + base · sums``, where ``sums`` are the weights' sums times their
scale. So a kernel that reads such a product takes three arrays: the product in int32; ``steps
[2, rows]``, step and base of each row; ``terms [3, outputs]``, scale, sums and bias of each output.
A row that is not finite gets a step that is NaN, and so does all that is computed of it.

A row may have 16 bits: ``whole`` is then ``[2 rows, width]``, the high bytes of all rows before the
low ones, and so is the product ``[2 rows, outputs]``. Whoever reads or writes sees it by that.

One file: Numba compiles anew what is cached when the kernel's own file has changed, no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.int8]
Whole: TypeAlias = NDArray[np.int32]
Places: TypeAlias = NDArray[np.int64]

BYTE = np.float32(256)
TINY = np.float32(1e-8)
"""The smallest step."""
_SIGNLESS = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
"""The bits of positive infinity; a NaN's are beyond."""
BLOCK = 64
"""Outputs that are looked at together."""
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_GELU = np.float32(2 * 0.7978845608028654)
_LARGEST = np.float32(87.0)
"""Of whose exponential a float32 holds."""

Kernel = TypeVar("Kernel", bound=Callable[..., object])


def _compiled(function: Kernel) -> Kernel:
    """Whole may be reordered, so that loops become vector instructions; NaN and infinity stay what
    they are, and a division by zero is infinite.
    """
    compiled = njit(
        cache=True,
        nogil=True,
        error_model="numpy",
        fastmath={"reassoc", "contract", "arcp", "nsz"},
    )(function)
    return cast(Kernel, compiled)


@_compiled
def normalise(
    x: Floats, gain: Floats, shift: Floats, epsilon: float, centred: bool, y: Floats
) -> None:
    """``y = x / rms(x) · gain + shift`` (RMSNorm: Zhang and Sennrich, 2019).

    Args:
        centred: of ``x - mean(x)`` instead (LayerNorm: Ba et al., 2016).
    """
    for row in range(x.shape[0]):
        _normalised(x[row], gain, shift, epsilon, centred, y[row])


@_compiled
def activate(product: Floats, gated: bool, y: Floats) -> None:
    """``y [rows, width]`` of a product.

    Args:
        gated: the product is ``[rows, 2 width]``, and ``y = silu(a) · b`` of its halves (SwiGLU:
            Shazeer, 2020); else ``y = gelu(a)``, by its approximation with tanh (Hendrycks and
            Gimpel, 2016).
    """
    powers = np.empty(y.shape[1], np.int32)
    for row in range(product.shape[0]):
        _activated(product[row], gated, powers, y[row])


@_compiled
def rotate_and_place(
    product: Floats,
    cos: Floats,
    sin: Floats,
    query: Floats,
    keys: Floats,
    values: Floats,
    places: Places,
) -> None:
    """Queries, keys and values out of one product; the first two turned by their positions
    (rotary embedding, in halves: Su et al., 2021), the last two where they belong in the cache.

    Args:
        product: ``[rows, (heads + 2 kv_heads) · dim]``.
        cos: ``[rows, dim]``, as is ``sin``.
        query: ``[rows, heads, dim]``, is written.
        keys: ``[places, kv_heads, dim]``, is written, as is ``values``.
        places: of each row.
    """
    for row in range(product.shape[0]):
        place = places[row]
        _turned(product[row], cos[row], sin[row], query[row], keys[place], values[place])


@_compiled
def add(product: Floats, y: Floats) -> None:
    """To ``y``."""
    for row in range(product.shape[0]):
        for i in range(product.shape[1]):
            y[row, i] += product[row, i]


@_compiled
def quantise_int8(x: Floats, gain: Floats, whole: Bytes, steps: Floats) -> None:
    """``x · gain`` in int8."""
    values = np.empty(x.shape[1] + 2, np.float32)
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            values[i] = x[row, i] * gain[i]
        _to_int8(values, row, whole, steps)


@_compiled
def normalise_int8(
    x: Floats,
    gain: Floats,
    shift: Floats,
    epsilon: float,
    centred: bool,
    more: Floats,
    whole: Bytes,
    steps: Floats,
) -> None:
    """As ``normalise``, times ``more``, in int8."""
    width = x.shape[1]
    values = np.empty(width + 2, np.float32)
    for row in range(x.shape[0]):
        _normalised(x[row], gain, shift, epsilon, centred, values[:width])
        for i in range(width):
            values[i] *= more[i]
        _to_int8(values, row, whole, steps)


@_compiled
def activate_int8(
    product: Whole,
    given: Floats,
    terms: Floats,
    gated: bool,
    gain: Floats,
    whole: Bytes,
    steps: Floats,
) -> None:
    """As ``activate``, times ``gain``, in int8; ``given`` are the product's own steps."""
    width = whole.shape[1]
    floats = np.empty(product.shape[1], np.float32)
    values = np.empty(width + 2, np.float32)
    powers = np.empty(width, np.int32)
    for row in range(given.shape[1]):
        _floats(product, row, given, terms, floats)
        _activated(floats, gated, powers, values[:width])
        for i in range(width):
            values[i] *= gain[i]
        _to_int8(values, row, whole, steps)


@_compiled
def rotate_and_place_int8(
    product: Whole,
    steps: Floats,
    terms: Floats,
    cos: Floats,
    sin: Floats,
    query: Floats,
    keys: Floats,
    values: Floats,
    places: Places,
) -> None:
    """As ``rotate_and_place``, of a product in int8."""
    whole = np.empty(product.shape[1], np.float32)
    for row in range(steps.shape[1]):
        place = places[row]
        _floats(product, row, steps, terms, whole)
        _turned(whole, cos[row], sin[row], query[row], keys[place], values[place])


@_compiled
def add_int8(product: Whole, steps: Floats, terms: Floats, y: Floats) -> None:
    """To ``y`` what a product is."""
    floats = np.empty(product.shape[1], np.float32)
    for row in range(y.shape[0]):
        _floats(product, row, steps, terms, floats)
        for i in range(product.shape[1]):
            y[row, i] += floats[i]


@_compiled
def dequantise(product: Whole, steps: Floats, terms: Floats) -> None:
    """In place of a product the floats it is."""
    y = product.view(np.float32)
    floats = np.empty(product.shape[1], np.float32)
    for row in range(steps.shape[1]):
        _floats(product, row, steps, terms, floats)
        y[row] = floats


@_compiled
def rescore(
    product: Whole, steps: Floats, terms: Floats, x: Floats, weight: Floats, margin: float
) -> None:
    """In place of a product ``[rows, outputs]`` the floats it is; exactly those that are within
    ``margin`` of a row's largest.

    Args:
        x: ``[rows, inputs]``, not rounded.
        weight: ``[outputs, inputs]``, not rounded.
    """
    outputs = product.shape[1]
    blocks = (outputs + BLOCK - 1) // BLOCK
    y = product.view(np.float32)
    largest = np.empty(blocks, np.int32)
    for row in range(product.shape[0]):
        by, shift = steps[0, row], steps[1, row]
        for block in range(blocks):
            at = block * BLOCK
            count = min(BLOCK, outputs - at)
            for i in range(at, at + count):
                value = np.float32(product[row, i])
                y[row, i] = _float(value, by, shift, terms[0, i], terms[1, i], terms[2, i])
            highest = np.int32(-_SIGNLESS)
            for i in range(at, at + count):
                highest = np.int32(max(highest, _in_order(product[row, i])))
            largest[block] = highest
        least = y[row, 0]  # of a row of NaN, which no number is equal to or above
        if not np.isnan(least):
            limit = np.empty(1, np.int32)
            limit[0] = _in_order(largest.max())  # it is its own inverse
            least = limit.view(np.float32)[0] - np.float32(margin)
        limit = np.empty(1, np.float32)
        limit[0] = least
        from_here = _in_order(limit.view(np.int32)[0])
        for block in range(blocks):
            if largest[block] >= from_here:
                at = block * BLOCK
                for i in range(at, min(at + BLOCK, outputs)):
                    if y[row, i] >= least:
                        exact = np.float32(0)
                        for j in range(x.shape[1]):
                            exact += x[row, j] * weight[i, j]
                        y[row, i] = exact + terms[2, i]


@_compiled
def _normalised(
    x: Floats, gain: Floats, shift: Floats, epsilon: float, centred: bool, y: Floats
) -> None:
    """One row."""
    width = np.float32(x.shape[0])
    mean = np.float32(0)
    if centred:
        for i in range(x.shape[0]):
            mean += x[i]
        mean /= width
    squares = np.float32(0)
    for i in range(x.shape[0]):
        squares += (x[i] - mean) * (x[i] - mean)
    by = np.float32(np.float32(1) / np.sqrt(squares / width + np.float32(epsilon)))
    for i in range(x.shape[0]):
        y[i] = (x[i] - mean) * by * gain[i] + shift[i]


@_compiled
def _activated(product: Floats, gated: bool, powers: Whole, y: Floats) -> None:
    """One row; ``powers [width]`` for our own use.

    Both are ``a / (1 + e⁻ᶻ)``: silu with ``z = a``, gelu with ``z = 2 √(2 / π) (a + 0.044715 a³)``.
    """
    width = y.shape[0]
    for i in range(width):  # e to the -z, as 2 to a whole number times a polynomial
        a = product[i]
        z = a if gated else _GELU * (a + np.float32(0.044715) * a * a * a)
        x = -z if -z < _LARGEST else _LARGEST
        x = x if x > -_LARGEST else -_LARGEST
        n = np.rint(x * _LOG2_E)
        r = x - n * _LN2_HIGH - n * _LN2_LOW
        p = np.float32(1 / 720)
        p = p * r + np.float32(1 / 120)
        p = p * r + np.float32(1 / 24)
        p = p * r + np.float32(1 / 6)
        p = p * r + np.float32(0.5)
        p = p * r + np.float32(1)
        y[i] = p * r + np.float32(1)
        powers[i] = np.int32(np.int32(n) + np.int32(127)) << np.int32(23)
    two = powers.view(np.float32)
    if gated:
        for i in range(width):
            y[i] = product[i] / (np.float32(1) + y[i] * two[i]) * product[width + i]
    else:
        for i in range(width):
            y[i] = product[i] / (np.float32(1) + y[i] * two[i])


@_compiled
def _turned(
    given: Floats, cos: Floats, sin: Floats, query: Floats, key: Floats, value: Floats
) -> None:
    """One row."""
    heads, dim = query.shape
    kv_heads = key.shape[0]
    half = dim // 2
    for head in range(heads):
        a, b = head * dim, head * dim + half
        for i in range(half):
            j = half + i
            query[head, i] = given[a + i] * cos[i] - given[b + i] * sin[i]
            query[head, j] = given[b + i] * cos[j] + given[a + i] * sin[j]
    for head in range(kv_heads):
        a, b = (heads + head) * dim, (heads + head) * dim + half
        for i in range(half):
            j = half + i
            key[head, i] = given[a + i] * cos[i] - given[b + i] * sin[i]
            key[head, j] = given[b + i] * cos[j] + given[a + i] * sin[j]
        a = (heads + kv_heads + head) * dim
        for i in range(dim):
            value[head, i] = given[a + i]


@_compiled
def _float(
    product: np.float32,
    by: np.float32,
    shift: np.float32,
    scale: np.float32,
    sums: np.float32,
    bias: np.float32,
) -> np.float32:
    """Of one output of a product; ``by`` and ``shift`` are its row's step and base."""
    return product * (by * scale) + shift * sums + bias


@_compiled
def _floats(product: Whole, row: int, steps: Floats, terms: Floats, y: Floats) -> None:
    """``y [outputs]`` of one row."""
    by, shift = steps[0, row], steps[1, row]
    low = row + steps.shape[1]
    if low < product.shape[0]:
        for i in range(product.shape[1]):
            value = BYTE * np.float32(product[row, i]) + np.float32(product[low, i])
            y[i] = _float(value, by, shift, terms[0, i], terms[1, i], terms[2, i])
    else:
        for i in range(product.shape[1]):
            value = np.float32(product[row, i])
            y[i] = _float(value, by, shift, terms[0, i], terms[1, i], terms[2, i])


@_compiled
def _to_int8(values: Floats, row: int, whole: Bytes, steps: Floats) -> None:
    """``values [width + 2]``, the last two for our own use."""
    width = whole.shape[1]
    low_row = row + steps.shape[1]
    fine = low_row < whole.shape[0]
    bits = values.view(np.int32)
    highest, lowest = np.int32(-_SIGNLESS), _SIGNLESS
    for i in range(width):
        order = _in_order(bits[i])
        highest = np.int32(max(highest, order))
        lowest = np.int32(min(lowest, order))
    if highest >= _INFINITY or lowest <= -_INFINITY - np.int32(1):
        steps[0, row] = steps[1, row] = np.float32(np.nan)
        whole[row, :] = 0
        if fine:
            whole[low_row, :] = 0
        return
    bits[width] = _in_order(highest)
    bits[width + 1] = _in_order(lowest)
    low = values[width + 1]
    levels = BYTE * BYTE if fine else BYTE
    by = max((values[width] - low) / (levels - np.float32(1)), TINY)
    times = np.float32(1) / by
    half = levels / np.float32(2)
    steps[0, row] = by
    if fine:
        for i in range(width):  # the difference first: of the lowest it is 0, whatever is rounded
            q = np.int32(np.rint((values[i] - low) * times - half))
            whole[row, i] = np.int8(q >> np.int32(8))
            whole[low_row, i] = np.int8((q & np.int32(255)) - np.int32(128))  # with a sign
        steps[1, row] = low + (half + BYTE / np.float32(2)) * by
    else:
        for i in range(width):
            whole[row, i] = np.int8(np.rint((values[i] - low) * times - half))
        steps[1, row] = low + half * by


@_compiled
def _in_order(bits: np.int32) -> np.int32:
    """A float's bits as a whole number, in the order of the floats; and back.

    Of whole numbers the largest is found many at a time, and NaN is beyond the infinities.
    """
    return np.int32(bits ^ ((bits >> np.int32(31)) & _SIGNLESS))
