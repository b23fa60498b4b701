"""One run: a classifier in; pruned, distilled and quantised; measured; the int8 file out."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from models.predictors import image, onnx_image
from train.data import digits
from train.recipe import Metrics, RunContext
from train.recipes.compression import Compression, speed
from train.recipes.compression.distillation import Hints, lower_bound, student
from train.recipes.compression.fit import accuracy
from train.recipes.compression.onnx_int8 import export, quantise
from train.recipes.compression.pruning import pruned, share_of_zeros

POINTS = 100
"""Accuracies are shares of one, their differences percentage points."""
LEAST_SPEEDUP = 1.8
"""Of the artifact over its input, for one image and for 32. Well below what is reached, which is 3,
so that the answer is the same in every run.
"""


def run(config: Compression, context: RunContext) -> Metrics:
    data = digits.load()
    pixels, labels = image.pixels(data.train_images), torch.tensor(data.train_labels)
    test, truth = image.pixels(data.test_images), torch.tensor(data.test_labels)
    source = context.inputs["image-classifier"]
    original = image.read(source)
    before = accuracy(original, test, truth)
    metrics: dict[str, float] = {"accuracy_before": before}

    def points_lost(after: float) -> float:
        return POINTS * (before - after)

    cut, tuned = pruned(
        original,
        pixels,
        labels,
        sparsity=config.sparsity,
        epochs=config.prune_epochs,
        learning_rate=config.prune_learning_rate,
        seed=config.seed,
    )
    metrics |= {
        "sparsity": share_of_zeros(tuned),
        "pruned_drop": points_lost(accuracy(tuned, test, truth)),
        "pruned_drop_untuned": points_lost(accuracy(cut, test, truth)),
    }
    pupil, told = distil(config, original, pixels, labels, test, truth, context)
    metrics |= told

    chosen = {"original": original, "pruned": tuned, "student": pupil}[config.network]
    whole, small = context.out / "float32.onnx", context.artifact / onnx_image.MODEL
    example = pixels[:2]
    export(chosen, example, whole)
    quantise(whole, pixels[: config.calibration].numpy(), small)
    exact = OnnxNet(whole)
    quick = OnnxNet(small)
    metrics |= {
        "accuracy": quick.accuracy(test, truth),
        "int8_drop": POINTS * (accuracy(chosen, test, truth) - quick.accuracy(test, truth)),
        "export_error": float((exact(test) - plain(chosen, test)).abs().max()),
        "bytes": float(small.stat().st_size),
        "size_ratio": (source / image.WEIGHTS).stat().st_size / small.stat().st_size,
    }
    # The times go to a file: metrics are the same for the same seed.
    table = speed.compare(
        {
            "torch_float32": lambda batch: plain(original, batch),
            "onnx_float32": exact,
            "onnx_int8": quick,
        },
        test,
        config.timings,
    )
    speed.write(table, context.out / "speed.json")
    metrics["faster"] = float(speed.slowest(table, "onnx_int8") >= LEAST_SPEEDUP)
    return metrics


def distil(
    config: Compression,
    teacher: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    test: Tensor,
    truth: Tensor,
    context: RunContext,
) -> tuple[nn.Module, dict[str, float]]:
    """The first student, and how all of them compare with their twins without a teacher."""
    architecture = image.Architecture(
        channels=config.student_channels, hidden=config.student_hidden
    )
    pixels, labels = pixels[: config.student_images], labels[: config.student_images]
    answers = plain(teacher, pixels)
    first: nn.Module | None = None
    taught, alone = [], []
    for number in range(config.students):
        seed = config.seed * 1000 + number
        pair = [
            student(
                image.build(architecture, seed=seed),
                pixels,
                labels,
                someones,
                hints=Hints(temperature=config.temperature, weight=config.hint),
                epochs=config.student_epochs,
                learning_rate=config.student_learning_rate,
                seed=seed,
            )
            for someones in (answers, None)
        ]
        first = first or pair[0]
        taught.append(accuracy(pair[0], test, truth))
        alone.append(accuracy(pair[1], test, truth))
        context.report(
            {"student_accuracy": taught[-1], "scratch_accuracy": alone[-1]},
            step=number + 1,
            total=config.students,
        )
    assert first is not None
    gains = [POINTS * (a - b) for a, b in zip(taught, alone, strict=True)]
    return first, {
        "student_weights": float(sum(p.numel() for p in first.parameters())),
        "student_accuracy": statistics.fmean(taught),
        "scratch_accuracy": statistics.fmean(alone),
        "student_gain": statistics.fmean(gains),
        "student_gain_low": lower_bound(gains),
    }


class OnnxNet:
    """An ONNX file that is called like the network it was made from."""

    def __init__(self, path: Path) -> None:
        self._session = onnx_image.session(path)

    def __call__(self, pixels: Tensor) -> Tensor:
        (logits,) = self._session.run([onnx_image.OUTPUT], {onnx_image.INPUT: pixels.numpy()})
        return torch.from_numpy(logits)

    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        return (self(pixels).argmax(1) == labels).double().mean().item()


def plain(net: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return net(pixels)
