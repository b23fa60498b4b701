"""Explainable AI (system 8), of images: what a classifier's answer rests on, and whether that can
be believed. The classifier is the artifact of another run.

__init__.py  what a person may set, and the recipe
measures.py  heatmaps measured by deletion, by their axioms and against captum
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.predictors import explanation
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.recipes import vision
from train.space import Choice


class ExplainImages(Config):
    method: Literal["grad-cam", "integrated-gradients", "lime"] = "integrated-gradients"
    """With which the artifact explains; all are measured."""
    images: int = Field(default=200, ge=1, le=1000)
    """So many test images."""


def run(config: ExplainImages, context: RunContext) -> Metrics:
    from models.predictors import image
    from train.data import digits
    from train.recipes.explain_images.measures import image_metrics

    source = context.inputs["image-classifier"]
    net = image.read(source)
    pixels = image.pixels(digits.load().test_images[: config.images])
    measured = image_metrics(net, pixels, config.seed)
    explanation.save(context.artifact, source, method=config.method)
    return {
        "over_random": measured[f"{config.method.replace('-', '_')}_over_random"],
        **measured,
    }


RECIPE = Recipe(
    name="explain_images",
    summary="Heatmaps of an image classifier: Grad-CAM, integrated gradients, LIME, measured",
    kind="explanation",
    config=ExplainImages,
    run=run,
    inputs=("image-classifier",),
    gates={
        "over_random": Gate(at_least=0.03, baseline="deleting in random order: 0"),
        "grad_cam_over_random": Gate(at_least=0.03, baseline="deleting in random order: 0"),
        "integrated_gradients_over_ink": Gate(
            at_least=0.05, baseline="deleting the brightest pixels first: 0"
        ),
        "lime_over_ink": Gate(at_least=0.03, baseline="deleting the brightest pixels first: 0"),
        "lime_r2": Gate(at_least=0.6, baseline="the average answer around an image: 0"),
        "completeness_error": Gate(
            at_most=0.01, baseline="what the attributions must add up to, by the axiom: 0"
        ),
        "captum_error": Gate(at_most=1e-5, baseline="captum's own Grad-CAM and gradients: 0"),
    },
    smoke_gates={
        "over_random": Gate(at_least=0.2, baseline="deleting in random order: 0"),
        "captum_error": Gate(at_most=1e-5, baseline="captum's own Grad-CAM and gradients: 0"),
    },
    smoke=ExplainImages(images=8),
    load=explanation.load,
    sample=vision.RECIPE.sample,
    data=vision.RECIPE.data,
    space={"method": Choice(("grad-cam", "integrated-gradients", "lime"))},
)
