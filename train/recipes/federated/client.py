"""What one client does in one round: weights in, update out. Needs nothing but its task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from models.predictors import image
from train.recipes.federated import privacy, secure
from train.recipes.federated.secure import Pads, Ring

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Everything a client needs; travels to wherever it is computed."""

    net: image.Architecture
    weights: NDArray[np.float32]
    """The global model, flat."""
    images: NDArray[np.uint8]
    """Shape (n, 28, 28): the client's own. On real devices they would already be there."""
    labels: NDArray[np.int64]
    seed: tuple[int, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    proximal: float
    members: int
    """Of this round: so many updates may be summed."""
    share: float
    """Weight of this update in the sum, at most 1."""
    clip: float | None
    noise: float
    """In units of ``clip``, of the sum of the ``least`` members that must answer."""
    least: int
    noise_seed: tuple[int, ...] | None
    pads: Pads | None


def answer(work: Work) -> Ring:
    """The update times the client's share, and the share; in fixed point, masked."""
    update = train(work)
    if work.clip is not None:
        update = privacy.clip(update, work.clip)
        if work.noise:
            update = update + privacy.member_noise(
                update.size,
                noise=work.noise,
                clip=work.clip,
                least=work.least,
                generator=np.random.default_rng(work.noise_seed),
            )
    values = secure.encode(np.append(update * work.share, work.share), work.members)
    return values if work.pads is None else work.pads.mask(values)


def train(work: Work) -> Vector:
    """How far the weights move in some epochs of SGD over the client's own images."""
    net = image.build(work.net)
    fill(net, work.weights)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=work.learning_rate)
    pixels = image.pixels(work.images)
    labels = torch.tensor(work.labels)
    generator = np.random.default_rng(work.seed)
    with torch.random.fork_rng(devices=[]):  # layers with randomness of their own
        torch.manual_seed(int(generator.integers(2**63)))
        net.train()
        for _ in range(work.epochs):
            order = torch.from_numpy(generator.permutation(len(labels)))
            for rows in order.split(work.batch_size):
                loss = functional.cross_entropy(net(pixels[rows]), labels[rows])
                if work.proximal:
                    far = sum(
                        ((p - b) ** 2).sum() for p, b in zip(net.parameters(), before, strict=True)
                    )
                    loss = loss + work.proximal / 2 * far
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return flat(net).astype(np.float64) - work.weights


def flat(net: nn.Module) -> NDArray[np.float32]:
    vector: NDArray[np.float32] = nn.utils.parameters_to_vector(net.parameters()).detach().numpy()
    return vector.copy()


def fill(net: nn.Module, weights: NDArray[np.float32]) -> None:
    # parameters become views of the vector they are filled from
    nn.utils.vector_to_parameters(torch.from_numpy(weights.copy()), net.parameters())
