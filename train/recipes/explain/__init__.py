"""Explainable AI: what an answer rests on, and whether that can be believed.

__init__.py   what a person may set, and the recipe
images.py     heatmaps of an image classifier, measured by deletion
tabular.py    SHAP values against the closed form of a linear model
attention.py  attention maps against sentences whose answer has a known place
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.predictors import explanation
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.recipes import vision
from train.space import Choice


class Explain(Config):
    method: Literal["grad-cam", "integrated-gradients", "lime"] = "integrated-gradients"
    """With which the artifact explains; all are measured."""
    images: int = Field(default=200, ge=1, le=1000)
    """So many test images."""
    rows: int = Field(default=50, ge=1, le=171)
    """So many held-out cases of the breast-cancer data."""
    attention_steps: int = Field(default=300, ge=1)
    """Training steps of the small transformer whose attention is looked at."""


def run(config: Explain, context: RunContext) -> Metrics:
    from models.predictors import image
    from train.data import digits
    from train.recipes.explain.attention import attention_metrics
    from train.recipes.explain.images import image_metrics
    from train.recipes.explain.tabular import shap_errors

    source = context.inputs["image-classifier"]
    net = image.read(source)
    pixels = image.pixels(digits.load().test_images[: config.images])
    measured = image_metrics(net, pixels, config.seed)
    metrics = {
        "over_random": measured[f"{config.method.replace('-', '_')}_over_random"],
        **measured,
        **shap_errors(config.rows, config.seed),
        **attention_metrics(config.attention_steps, config.seed),
    }
    explanation.save(context.artifact, source, method=config.method)
    return metrics


RECIPE = Recipe(
    name="explain",
    summary="Grad-CAM, integrated gradients, LIME, SHAP, attention: explanations held to the truth",
    kind="explanation",
    config=Explain,
    run=run,
    inputs=("image-classifier",),
    gates={
        "over_random": Gate(at_least=0.03, baseline="deleting in random order: 0"),
        "shap_error": Gate(at_most=1e-6, baseline="w (x - mean), the closed form"),
        "linear_shap_error": Gate(at_most=1e-6, baseline="w (x - mean), the closed form"),
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
        "attention_hits": Gate(at_least=0.9, baseline="chance, one of 12 places: 0.083"),
    },
    smoke_gates={
        "over_random": Gate(at_least=0.2, baseline="deleting in random order: 0"),
        "shap_error": Gate(at_most=1e-6, baseline="w (x - mean), the closed form"),
        "captum_error": Gate(at_most=1e-5, baseline="captum's own Grad-CAM and gradients: 0"),
    },
    smoke=Explain(images=8, rows=5, attention_steps=150),
    load=explanation.load,
    sample=vision.RECIPE.sample,
    data=(
        vision.RECIPE.data + "; 569 breast-cancer cases of the University of Wisconsin "
        "(Street, Wolberg, Mangasarian 1993; CC-BY-4.0) as scikit-learn carries them, for the "
        "check of SHAP values alone"
    ),
    space={"method": Choice(("grad-cam", "integrated-gradients", "lime"))},
)
