"""One client: its images and its secrets stay with it; weights come, a masked update goes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from models.predictors import image
from train.data import digits
from train.recipes.federated import Federated, privacy, secure
from train.recipes.federated.secure import Member, Opened, PublicKeys, Ring

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a client is told in one round."""

    net: image.Architecture
    weights: NDArray[np.float32]
    """The global model, flat."""
    seed: tuple[int, ...]
    members: int
    """Of this round: so many updates may be summed."""
    share: float
    """Weight of this update in the sum, at most 1."""
    least: int
    """Members that must answer; their noise adds up to that of the whole."""
    noise_seed: tuple[int, ...] | None


class Client:
    """Keeps its own images, and the secrets of the round that it is in.

    Args:
        who: its number, and its rows of the training images. (On real devices the images would
            be there already.)
    """

    def __init__(self, config: Federated, who: tuple[int, NDArray[np.int64]]) -> None:
        self._config = config
        self._index, rows = who
        data = digits.load()
        self._images = data.train_images[rows]
        self._labels = data.train_labels[rows]
        self._member: Member | None = None

    # The four steps of secure.py. A client whose process was lost in the middle of a round has
    # forgotten its secrets; it says so with None, and is gone until the next round.

    def keys(self) -> PublicKeys:
        """Begin a round, with new secrets."""
        self._member = Member(self._index)
        return self._member.keys()

    def deal(self, keys: Mapping[int, PublicKeys], threshold: int) -> dict[int, bytes] | None:
        return None if self._member is None else self._member.deal(keys, threshold)

    def receive(self, letters: Mapping[int, bytes]) -> bool | None:
        if self._member is None:
            return None
        self._member.receive(letters)
        return True

    def answer(self, work: Work) -> Ring | None:
        """The update times the client's share, and the share; in fixed point, masked."""
        config = self._config
        if config.secure and self._member is None:
            return None
        update = self.train(work)
        if config.clip is not None:
            update = privacy.clip(update, config.clip)
            if config.noise:
                update = update + privacy.member_noise(
                    update.size,
                    noise=config.noise,
                    clip=config.clip,
                    least=work.least,
                    generator=np.random.default_rng(work.noise_seed),
                )
        values = secure.encode(np.append(update * work.share, work.share), work.members)
        return self._member.pads().mask(values) if self._member else values

    def open(self, answered: Collection[int]) -> Opened | None:
        return None if self._member is None else self._member.open(answered)

    def train(self, work: Work) -> Vector:
        """How far the weights move in some epochs of SGD over the client's own images."""
        config = self._config
        net = image.build(work.net)
        fill(net, work.weights)
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = torch.optim.SGD(net.parameters(), lr=config.learning_rate)
        pixels = image.pixels(self._images)
        labels = torch.tensor(self._labels)
        generator = np.random.default_rng(work.seed)
        with torch.random.fork_rng(devices=[]):  # layers with randomness of their own
            torch.manual_seed(int(generator.integers(2**63)))
            net.train()
            for _ in range(config.epochs):
                order = torch.from_numpy(generator.permutation(len(labels)))
                for rows in order.split(config.batch_size):
                    loss = functional.cross_entropy(net(pixels[rows]), labels[rows])
                    if config.proximal:
                        far = sum(
                            ((p - b) ** 2).sum()
                            for p, b in zip(net.parameters(), before, strict=True)
                        )
                        loss = loss + config.proximal / 2 * far
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
