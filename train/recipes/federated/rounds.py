"""The server's side: rounds of federated averaging, and what it learns in each: a sum."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional

from models.predictors import image
from train.data import digits
from train.data.digits import Digits
from train.recipe import Metrics, RunContext
from train.recipes.federated import Federated, client, privacy, secure
from train.recipes.federated.client import Work
from train.recipes.federated.secure import Member, Pads, Ring

_SHARDS, _DRAW, _LOSE, _TRAIN, _NOISE = range(5)
"""Streams of random numbers: seed, stream, round, client. A resumed run draws the same ones."""

FEWEST = 2
"""Members of a round; the sum of one would be its update."""


def run(config: Federated, context: RunContext) -> Metrics:
    data = digits.load()
    parts = shards(data.train_labels, config)
    net = image.build(image.ARCHITECTURE, seed=config.seed)
    weights, done = client.flat(net), 0
    if context.checkpoint is not None:
        weights, done = _resume(context.checkpoint)
    client.fill(net, weights)
    metrics = evaluate(config, net, data, done)
    for number in range(done, config.rounds):
        works, members = plan(config, number, weights, parts, data.train_images, data.train_labels)
        step = collect(config, works, members, context)
        if step is not None:
            weights = (weights + step).astype(np.float32)
        client.fill(net, weights)
        metrics = evaluate(config, net, data, number + 1)
        context.report(
            {**metrics, "answers": float(len(works))},
            step=number + 1,
            total=config.rounds,
            checkpoint=partial(_save, weights=weights, done=number + 1),
        )
    image.save(context.artifact, net)
    return metrics


def shards(labels: NDArray[np.int64], config: Federated) -> list[NDArray[np.int64]]:
    """Each client's rows: ``config.shards`` random pieces of the rows sorted by label.

    McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized
    Data, section 3.
    """
    generator = np.random.default_rng((config.seed, _SHARDS))
    pieces = np.array_split(np.argsort(labels, kind="stable"), config.clients * config.shards)
    order = generator.permutation(len(pieces)).reshape(config.clients, config.shards)
    return [np.concatenate([pieces[i] for i in row]) for row in order]


def plan(
    config: Federated,
    number: int,
    weights: NDArray[np.float32],
    parts: list[NDArray[np.int64]],
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> tuple[dict[int, Work], dict[int, Member]]:
    """The work of those who will answer in a round, and everyone who was drawn for it.

    The members' secrets are made anew each time, and leave no trace in the sum; only members
    and their work hold them.
    """
    private = config.noise > 0
    drawing = _generator(config, private, _DRAW, number)
    drawn = np.flatnonzero(drawing.random(config.clients) < config.rate).tolist()
    if len(drawn) < FEWEST:
        return {}, {}
    least = threshold(len(drawn))
    losing = np.random.default_rng((config.seed, _LOSE, number))
    staying = losing.random(config.clients) >= config.dropout
    members = {index: Member(index) for index in drawn}
    pads: dict[int, Pads] = {}
    if config.secure:
        keys = {index: member.keys() for index, member in members.items()}
        letters = {index: member.deal(keys, least) for index, member in members.items()}
        for index, member in members.items():
            member.receive({i: sent[index] for i, sent in letters.items() if i != index})
            pads[index] = member.pads()
    most = max(len(part) for part in parts)
    works = {
        index: Work(
            net=image.ARCHITECTURE,
            weights=weights,
            images=images[parts[index]],
            labels=labels[parts[index]],
            seed=(config.seed, _TRAIN, number, index),
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            proximal=config.proximal,
            members=len(drawn),
            # A client with more images has more to say, unless its weight would tell on it.
            share=1.0 if private else len(parts[index]) / most,
            clip=config.clip,
            noise=config.noise,
            least=least,
            noise_seed=None
            if config.noise_seed is None
            else (config.noise_seed, _NOISE, number, index),
            pads=pads.get(index),
        )
        for index in drawn
        if staying[index]
    }
    return works, members


def threshold(members: int) -> int:
    """Two thirds: a third may be lost in a round."""
    return max(members // 2 + 1, math.ceil(2 * members / 3))


def collect(
    config: Federated, works: dict[int, Work], members: dict[int, Member], context: RunContext
) -> NDArray[np.float64] | None:
    """The mean update of a round; ``None`` if too many are gone."""
    if not members or len(works) < threshold(len(members)):
        return None
    answers = dict(zip(works, context.map(client.answer, list(works.values())), strict=True))
    if config.secure:
        opened = [members[index].open(works.keys()) for index in works]
        keys = {index: member.keys() for index, member in members.items()}
        total = secure.unmask(answers, keys, opened, threshold(len(members)))
    else:
        total = _add(answers)
    values = secure.decode(total)
    # A private mean divides by a number that does not depend on who takes part.
    return values[:-1] / (config.rate * config.clients if config.noise else values[-1])


def evaluate(config: Federated, net: nn.Module, data: Digits, done: int) -> dict[str, float]:
    net.eval()
    with torch.inference_mode():
        logits = net(image.pixels(data.test_images))
    truth = torch.tensor(data.test_labels)
    metrics = {
        "accuracy": (logits.argmax(1) == truth).double().mean().item(),
        "test_loss": functional.cross_entropy(logits, truth).item(),
    }
    if config.noise and config.noise_seed is None:
        metrics["epsilon"] = privacy.epsilon(
            noise=config.noise, rate=config.rate, rounds=done, delta=config.delta
        )
    return metrics


def _add(answers: dict[int, Ring]) -> Ring:
    total = np.zeros_like(next(iter(answers.values())))
    for vector in answers.values():
        total += vector
    return total


def _generator(config: Federated, private: bool, *stream: int) -> np.random.Generator:
    """Repeatable, but in a private run: there, who is drawn must stay unknown, too."""
    if not private:
        return np.random.default_rng((config.seed, *stream))
    seed = config.noise_seed
    return np.random.default_rng(None if seed is None else (seed, *stream))


def _save(folder: Path, *, weights: NDArray[np.float32], done: int) -> None:
    save_file({"weights": weights}, folder / "weights.safetensors")
    (folder / "rounds.json").write_text(json.dumps({"done": done}))


def _resume(folder: Path) -> tuple[NDArray[np.float32], int]:
    weights = load_file(folder / "weights.safetensors")["weights"]
    return weights, json.loads((folder / "rounds.json").read_text())["done"]
