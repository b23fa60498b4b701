"""How good the explanations of an image classifier are, measured on the classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.errors import ConfigError
from models.predictors.explanation import (
    METHODS,
    Lime,
    grad_cam,
    integrated_gradients,
    last_convolution,
)

STEPS = 28


def deletion(net: nn.Module, pixels: Tensor, labels: Tensor, importance: Tensor) -> Tensor:
    """Area under the label's probability while pixels go black, the most important first.

    Petsiuk, Das, Saenko 2018, RISE. Small is good: what was said to matter did.

    Args:
        importance: shape (n, height, width).

    Returns:
        Shape (n,), between 0 and 1.
    """
    order = importance.flatten(1).argsort(dim=1, descending=True, stable=True)
    left = pixels.flatten(1).clone()
    each = -(-left.shape[1] // STEPS)
    curve = [_probability(net, pixels, labels)]
    for rows in order.split(each, 1):
        left.scatter_(1, rows, 0.0)
        curve.append(_probability(net, left.view_as(pixels), labels))
    return torch.trapezoid(torch.stack(curve), dim=0) / (len(curve) - 1)


def image_metrics(net: nn.Module, pixels: Tensor, seed: int) -> dict[str, float]:
    """Explain the network's own answers, and hold each method against two simple orders.

    ``random_deletion`` removes pixels in any order, ``ink_deletion`` the brightest first, which
    needs no network: on black ground, ink is all there is to remove. ``…_over_random`` and
    ``…_over_ink`` say by how much a method's area is smaller.
    """
    with torch.no_grad():
        labels = net(pixels).argmax(1)
    generator = torch.Generator().manual_seed(seed)
    simple = {
        "random": torch.rand(pixels[:, 0].shape, generator=generator),
        "ink": pixels[:, 0],
    }
    maps = {name.replace("-", "_"): method(net, pixels, labels) for name, method in METHODS.items()}
    areas = {
        name: deletion(net, pixels, labels, importance).mean().item()
        for name, importance in {**simple, **maps}.items()
    }
    return {
        **{f"{name}_deletion": area for name, area in areas.items()},
        **{f"{name}_over_{low}": areas[low] - areas[name] for name in maps for low in simple},
        "completeness_error": completeness_error(net, pixels, labels),
        "captum_error": captum_error(net, pixels, labels),
        "lime_r2": lime_r2(net, pixels, labels, seed),
    }


def completeness_error(net: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Integrated gradients against what they must add up to, in logits; the mean distance."""
    with torch.no_grad():
        gained = (net(pixels) - net(torch.zeros_like(pixels))).gather(1, labels[:, None])[:, 0]
    given = integrated_gradients(net, pixels, labels).sum((1, 2))
    return ((given - gained).abs() / gained.abs().mean()).mean().item()


def captum_error(net: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Largest difference between our Grad-CAM and integrated gradients and captum's."""
    try:
        from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam
    except ImportError:
        raise ConfigError("comparing needs pip install 'frontier-run[explain]'") from None
    coarse = LayerGradCam(net, last_convolution(net)).attribute(
        pixels, target=labels, relu_attributions=True
    )
    cam = LayerAttribution.interpolate(coarse, tuple(pixels.shape[2:]), "bilinear")[:, 0]
    path = IntegratedGradients(net).attribute(
        pixels, target=labels, n_steps=64, method="riemann_middle"
    )
    return max(
        (cam - grad_cam(net, pixels, labels)).abs().max().item(),
        (path.sum(1) - integrated_gradients(net, pixels, labels)).abs().max().item(),
    )


def lime_r2(net: nn.Module, pixels: Tensor, labels: Tensor, seed: int) -> float:
    """How much of the network's answers the linear imitation explains, on altered images that
    it was not fitted to; the mean over images. 0 is as good as their average.
    """
    lime = Lime()
    fitted = lime.fit(net, pixels, labels)
    parts = fitted.shape[1] - 1
    on = lime.examples(parts, 200, seed=lime.seed + seed + 1)
    truth = lime.logits(net, pixels, labels, on)
    told = fitted[:, :1] + fitted[:, 1:] @ on.T
    left = ((truth - told) ** 2).sum(1)
    whole = ((truth - truth.mean(1, keepdim=True)) ** 2).sum(1)
    return (1 - left / whole).mean().item()


def _probability(net: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return net(pixels).softmax(1).gather(1, labels[:, None])[:, 0]
