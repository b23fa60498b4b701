"""Differential privacy for clients: clip each update, add noise to the sum, count what it cost.

McMahan et al. 2018, Learning Differentially Private Recurrent Language Models: a client is in
a round with probability ``rate``, independently of the others (Poisson sampling); its update
has at most length ``clip``; the sum gets Gaussian noise of ``noise * clip`` in every direction.
What is protected is whether a client took part at all.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

ORDERS = (*range(2, 65), *range(72, 513, 8))


def clip(update: NDArray[np.float64], length: float) -> NDArray[np.float64]:
    """Shortened to ``length`` if it is longer (L2)."""
    norm = float(np.linalg.norm(update))
    return update if norm <= length else update * (length / norm)


def member_noise(
    size: int, *, noise: float, clip: float, least: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """One member's part of the noise, so that not even the server sees a sum without it.

    Args:
        noise: standard deviation of the whole, in units of ``clip``.
        least: as few members may answer; so few still add up to the whole noise, more of them
            to more than it.
    """
    return generator.normal(0.0, noise * clip / math.sqrt(least), size)


def epsilon(*, noise: float, rate: float, rounds: int, delta: float) -> float:
    """The run is (epsilon, ``delta``)-private to each client.

    Rényi privacy of the sampled Gaussian mechanism, added up over the rounds (Mironov, Talwar,
    Zhang 2019, section 3.3), converted by Canonne, Kamath, Steinke 2020, proposition 12.
    """
    if noise == 0:
        return math.inf
    found = math.inf
    for order in ORDERS:
        spent = rounds * renyi(order, noise=noise, rate=rate)
        found = min(
            found,
            spent + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1),
        )
    return max(0.0, found)


def renyi(order: int, *, noise: float, rate: float) -> float:
    """Rényi divergence of one round, for whole ``order`` >= 2: equation 30 of Mironov et al."""
    if rate == 1:
        return order / (2 * noise**2)
    k = np.arange(order + 1)
    logs = np.log(np.maximum(k, 1)).cumsum()  # of k!
    terms = logs[order] - logs - logs[::-1] + k * math.log(rate) + k[::-1] * math.log1p(-rate)
    return float(np.logaddexp.reduce(terms + k * (k - 1) / (2 * noise**2))) / (order - 1)
