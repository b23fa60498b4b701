"""Model compression (system 3) of an image classifier: whole numbers, fewer weights, a smaller
network. ``compression_llm`` does language models.

__init__.py      what a person may set, and the recipe
pipeline.py      one run: all three, measured, and the artifact
onnx_int8.py     export and static int8 quantisation
pruning.py       magnitude pruning with fine-tuning
distillation.py  a small student of a large teacher
fit.py           the training loop of the last two
speed.py         how long a call takes, before and after
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.predictors import onnx_image
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.recipes import vision
from train.space import Choice, Float, Int


class Compression(Config):
    network: Literal["original", "pruned", "student"] = "original"
    """What becomes the int8 artifact; all three are made and measured."""
    calibration: int = Field(default=512, ge=1, le=4000)
    """Training images from which the ranges of activations are taken."""
    sparsity: float = Field(default=0.8, gt=0, lt=1)
    """Share of weights that pruning sets to zero."""
    prune_epochs: int = Field(default=6, ge=1)
    prune_learning_rate: float = Field(default=1e-3, gt=0)
    student_channels: tuple[int, ...] = Field(default=(8, 16), min_length=1, max_length=3)
    """Of the student's convolutions."""
    student_hidden: int = Field(default=32, ge=1)
    student_images: int = Field(default=1000, ge=10, le=4000)
    """Labelled images that students see, as they are: a teacher helps most where they are few."""
    student_epochs: int = Field(default=30, ge=1)
    student_learning_rate: float = Field(default=3e-3, gt=0)
    students: int = Field(default=5, ge=1, le=50)
    """Pairs of a student and the same network without a teacher, each with a seed of its own."""
    temperature: float = Field(default=4.0, gt=0)
    hint: float = Field(default=0.7, ge=0, le=1)
    """Weight of the teacher's answers in a student's loss; the labels have the rest."""
    timings: int = Field(default=50, ge=1)
    """Rounds of the comparison of speed, whose times are in ``out/speed.json``."""


def run(config: Compression, context: RunContext) -> Metrics:
    from train.recipes.compression import pipeline

    return pipeline.run(config, context)


RECIPE = Recipe(
    name="compression",
    summary="A smaller, faster classifier: int8, pruning, distillation",
    kind="onnx-image-classifier",
    config=Compression,
    run=run,
    inputs=("image-classifier",),
    gates={
        "student_gain_low": Gate(
            at_least=0.0, baseline="the same small network trained without a teacher: 0"
        ),
        "int8_drop": Gate(at_most=1.0, baseline="the network in float32: 0"),
        "size_ratio": Gate(at_least=3.0, baseline="the float32 weights of its input: 1"),
        "faster": Gate(
            at_least=1.0,
            baseline="1: at least 1.8 times as fast as its input, in the same run",
        ),
        "pruned_drop": Gate(at_most=1.0, baseline="the network with all of its weights: 0"),
        "sparsity": Gate(at_least=0.8, baseline="the network with all of its weights: 0"),
    },
    smoke_gates={"int8_drop": Gate(at_most=2.0, baseline="the network in float32: 0")},
    smoke=Compression(
        calibration=64, prune_epochs=1, student_images=200, student_epochs=3, students=2, timings=15
    ),
    load=onnx_image.load,
    sample=vision.RECIPE.sample,
    space={
        "sparsity": Float(low=0.5, high=0.95),
        "calibration": Choice((64, 256, 1024)),
        "temperature": Float(low=1.0, high=10.0, log=True),
        "hint": Float(low=0.3, high=1.0),
        "student_epochs": Int(low=5, high=60),
    },
    data=vision.RECIPE.data,
)
