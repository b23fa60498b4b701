"""The server's side: rounds of federated averaging, and what it learns in each: a sum."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional

from models.predictors import image
from train.data import digits
from train.data.digits import Digits
from train.recipe import Actors, Metrics, RunContext
from train.recipes.federated import Federated, client, privacy, secure
from train.recipes.federated.client import Client, Work
from train.recipes.federated.secure import PublicKeys, Ring

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
    sizes = [len(part) for part in parts]
    with context.actors(partial(Client, config), list(enumerate(parts))) as clients:
        for number in range(done, config.rounds):
            step, answers = learn(config, number, weights, sizes, clients)
            if step is not None:
                weights = (weights + step).astype(np.float32)
            client.fill(net, weights)
            metrics = evaluate(config, net, data, number + 1)
            context.report(
                {**metrics, "answers": float(answers)},
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


def draw(config: Federated, number: int) -> tuple[list[int], list[int]]:
    """Who is in a round, and who of them will answer."""
    drawing = _generator(config, config.noise > 0, _DRAW, number)
    drawn = np.flatnonzero(drawing.random(config.clients) < config.rate).tolist()
    losing = np.random.default_rng((config.seed, _LOSE, number))
    staying = losing.random(config.clients) >= config.dropout
    return drawn, [index for index in drawn if staying[index]]


def learn(
    config: Federated,
    number: int,
    weights: NDArray[np.float32],
    sizes: list[int],
    clients: Actors,
) -> tuple[NDArray[np.float64] | None, int]:
    """The mean update of a round, and how many answered; ``None`` if too many are gone.

    Args:
        sizes: how many images each client has.
    """
    drawn, staying = draw(config, number)
    least = threshold(len(drawn))
    if len(drawn) < FEWEST or len(staying) < least:
        return None, len(staying)
    keys = introduce(clients, drawn, least) if config.secure else {}
    if keys is None:
        return None, 0
    works = {
        index: (
            Work(
                net=image.ARCHITECTURE,
                weights=weights,
                seed=(config.seed, _TRAIN, number, index),
                members=len(drawn),
                # A client with more images has more to say, unless its weight would tell on it.
                share=1.0 if config.noise else sizes[index] / max(sizes),
                least=least,
                noise_seed=None
                if config.noise_seed is None
                else (config.noise_seed, _NOISE, number, index),
            ),
        )
        for index in staying
    }
    answers = _ask(clients, "answer", works)
    if len(answers) < least:
        return None, len(answers)
    if config.secure:
        opened = _ask(clients, "open", {index: (list(answers),) for index in answers})
        if len(opened) < least:
            return None, len(answers)
        total = secure.unmask(answers, keys, opened.values(), least)
    else:
        total = _add(answers)
    values = secure.decode(total)
    # A private mean divides by a number that does not depend on who takes part.
    divisor = config.rate * config.clients if config.noise else values[-1]
    return values[:-1] / divisor, len(answers)


def introduce(clients: Actors, drawn: list[int], least: int) -> Mapping[int, PublicKeys] | None:
    """Everyone's public keys, when every member has a letter of every other.

    The letters pass through the server's hands, which can open none. ``None``: somebody was
    lost on the way, before anyone was trained; the round is given up.
    """
    keys = _ask(clients, "keys", dict.fromkeys(drawn, ()))
    if len(keys) < len(drawn):
        return None
    sent = _ask(clients, "deal", dict.fromkeys(drawn, (keys, least)))
    if len(sent) < len(drawn):
        return None
    got = {index: {i: sent[i][index] for i in drawn if i != index} for index in drawn}
    received = _ask(clients, "receive", {index: (got[index],) for index in drawn})
    return keys if len(received) == len(drawn) else None


def _ask(clients: Actors, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
    """The answers there are, in the order of the clients."""
    found = clients.call(method, arguments)
    return {index: found[index] for index in arguments if found.get(index) is not None}


def threshold(members: int) -> int:
    """Two thirds: a third may be lost in a round."""
    return max(members // 2 + 1, math.ceil(2 * members / 3))


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
