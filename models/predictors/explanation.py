"""Which pixels an image classifier's answer rests on: {label, heatmap, method}.

The methods are functions of a network and a batch; each needs a few forward and backward
passes and nothing but torch, so that a replica explains with what it serves with.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from models.contracts import Json
from models.errors import ConfigError
from models.predictors import image

if TYPE_CHECKING:
    import torch
    from torch import nn

EXPLANATION = "explanation.json"

Method: TypeAlias = "Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]"
"""A network, pixels (n, 1, height, width), a label each (n) → importance (n, height, width)."""


def grad_cam(net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What of the last convolution's output spoke for the label, enlarged to the image.

    Selvaraju et al. 2017, Grad-CAM.
    """
    import torch
    from torch.nn import functional

    kept: list[torch.Tensor] = []
    hook = last_convolution(net).register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        with torch.enable_grad():
            logits = net(pixels)
            chosen = logits.gather(1, labels[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, kept[0])
    finally:
        hook.remove()
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    coarse = functional.relu((weights * kept[0].detach()).sum(1, keepdim=True))
    size = pixels.shape[2:]
    return functional.interpolate(coarse, size, mode="bilinear", align_corners=False)[:, 0]


def integrated_gradients(
    net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, *, steps: int = 64
) -> torch.Tensor:
    """Gradients along the way from an empty image, times the way; signed.

    They add up to what the label's logit gains over that of the empty image, up to the error
    of the midpoint rule. Sundararajan, Taly, Yan 2017, Axiomatic Attribution.
    """
    import torch

    on_the_way = (torch.arange(steps) + 0.5).view(-1, 1, 1, 1) / steps
    found = []
    for one, label in zip(pixels, labels, strict=True):
        with torch.enable_grad():
            points = (one * on_the_way).requires_grad_()
            (gradients,) = torch.autograd.grad(net(points)[:, label].sum(), points)
        found.append((gradients.mean(0) * one).sum(0))
    return torch.stack(found)


class Lime:
    """Weights of a linear model that imitates the network around one image; signed.

    Ribeiro, Singh, Guestrin 2016, "Why Should I Trust You?": parts of the image are switched
    off at random, and ridge regression, in which nearby examples count more, tells what each
    part adds to the label's logit. Every image gets the same examples, so that its
    explanation does not depend on what it is explained with.

    Args:
        cell: parts are squares of so many pixels.
        samples: how many altered images are looked at.
        width: of the kernel, in units of the distance from everything on to everything off.
    """

    def __init__(
        self,
        *,
        cell: int = 4,
        samples: int = 400,
        width: float = 0.75,
        ridge: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.cell, self.samples, self.width = cell, samples, width
        self.ridge, self.seed = ridge, seed

    def __call__(self, net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        coefficients = self.fit(net, pixels, labels)[:, 1:]
        height, width = pixels.shape[2:]
        rows, columns = self._grid(height, width)
        cells = coefficients.reshape(-1, rows, columns)
        return cells.repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2)[
            :, :height, :width
        ]

    def fit(self, net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Intercept and one coefficient a part, shape (n, 1 + parts)."""
        import torch

        height, width = pixels.shape[2:]
        parts = math.prod(self._grid(height, width))
        on = self.examples(parts, self.samples, self.seed)
        design = torch.cat([torch.ones(self.samples, 1), on], 1).double()
        away = 1 - on.double().mean(1).sqrt()  # cosine distance to everything on
        weight = torch.exp(-(away**2) / self.width**2)[:, None]
        penalty = self.ridge * torch.eye(1 + parts, dtype=torch.float64)
        penalty[0, 0] = 0
        answers = self.logits(net, pixels, labels, on).double().T
        return torch.linalg.solve(
            design.T @ (weight * design) + penalty, design.T @ (weight * answers)
        ).T.float()

    def logits(
        self, net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, on: torch.Tensor
    ) -> torch.Tensor:
        """The label's logit with only the parts that are ``on``: (n, examples)."""
        import torch

        height, width = pixels.shape[2:]
        rows, columns = self._grid(height, width)
        masks = on.reshape(-1, 1, rows, columns)
        masks = masks.repeat_interleave(self.cell, 2).repeat_interleave(self.cell, 3)
        masks = masks[:, :, :height, :width]
        with torch.no_grad():
            return torch.stack(
                [net(one * masks)[:, label] for one, label in zip(pixels, labels, strict=True)]
            )

    @staticmethod
    def examples(parts: int, samples: int, seed: int) -> torch.Tensor:
        """Rows of 0 and 1; each part is off in half of them."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 2, (samples, parts), generator=generator).float()

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.cell), -(-width // self.cell)


METHODS: Mapping[str, Method] = {
    "grad-cam": grad_cam,
    "integrated-gradients": integrated_gradients,
    "lime": Lime(),
}


def last_convolution(net: nn.Module) -> nn.Module:
    from torch import nn

    found = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    if not found:
        raise ConfigError("Grad-CAM needs a network with a convolution; use another method")
    return found[-1]


def save(folder: Path, classifier: Path, *, method: str) -> None:
    """Write what ``load`` reads: the method, and a copy of the classifier in ``classifier``."""
    for name in (image.ARCHITECTURE_FILE, image.WEIGHTS):
        shutil.copyfile(classifier / name, folder / name)
    (folder / EXPLANATION).write_text(json.dumps({"method": method}) + "\n")


def load(folder: Path) -> ExplainingPredictor:
    """Raises ConfigError: the files cannot be used."""
    try:
        method = json.loads((folder / EXPLANATION).read_text())["method"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: {EXPLANATION} cannot be used ({error})") from None
    if method not in METHODS:
        raise ConfigError(
            f"{folder}: {EXPLANATION} names the method {method!r}; known are {', '.join(METHODS)}"
        )
    net = image.read(folder)
    return ExplainingPredictor(net, image.architecture_of(net), method)


class ExplainingPredictor:
    """Inputs are images, as :class:`models.predictors.image.ImagePredictor` takes them.

    ``heatmap`` has a row for each row of the image: above 0 what speaks for the label, below 0
    what speaks against it (Grad-CAM shows only the first). Its largest value is 1 or -1.
    """

    def __init__(self, net: nn.Sequential, architecture: image.Architecture, method: str) -> None:
        self._net, self._method = net, method
        self._height, self._width = architecture.height, architecture.width

    def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
        """See :class:`models.contracts.Predictor`."""
        if not inputs:
            return []
        pixels = image.pixels(image.grey_values(inputs, self._height, self._width))
        # One at a time: each needs many passes of its own anyway.
        return [self._explained(one) for one in pixels.split(1)]

    def _explained(self, pixels: torch.Tensor) -> Json:
        label = self._net(pixels).detach().argmax(1)
        heatmap = METHODS[self._method](self._net, pixels, label)[0].double()
        heatmap /= heatmap.abs().max().clamp_min(1e-30)
        rows = heatmap.mul(1e4).round().div(1e4).tolist()
        return {"label": int(label), "heatmap": rows, "method": self._method}
