"""Explanations of networks whose reasons are known, and the predictor around them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.errors import ConfigError, InvalidInput
from models.predictors import explanation, image

SMALL = image.Architecture(channels=(4, 8), hidden=8, height=28, width=28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with random weights."""
    where = tmp_path_factory.mktemp("classifier")
    image.save(where, image.build(SMALL, seed=1), SMALL)
    return where


@pytest.fixture(params=explanation.METHODS)
def explainer(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    explanation.save(tmp_path, folder, method=request.param)
    return tmp_path


def pictures(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 784), generator=generator).tolist()


def linear(height: int, width: int) -> tuple[nn.Sequential, torch.Tensor]:
    """A network without bends, and its weights for label 1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(height * width, 2))
    return net, net[1].weight[1].detach().view(height, width)


def test_integrated_gradients_of_a_linear_network_are_weight_times_pixel() -> None:
    net, weights = linear(6, 5)
    pixels = torch.rand(3, 1, 6, 5)
    found = explanation.integrated_gradients(net, pixels, torch.tensor([1, 1, 1]), steps=3)
    torch.testing.assert_close(found, weights * pixels[:, 0])


def test_lime_finds_what_each_part_adds() -> None:
    net, weights = linear(10, 8)
    pixels = torch.rand(2, 1, 10, 8)
    lime = explanation.Lime(cell=4, samples=200, ridge=1e-6)
    found = lime(net, pixels, torch.tensor([1, 1]))
    for top in (0, 4, 8):  # the last row of parts is cut short
        for left in (0, 4):
            part = (slice(None), slice(top, top + 4), slice(left, left + 4))
            adds = (weights * pixels[:, 0])[part].sum((1, 2))
            torch.testing.assert_close(found[:, top, left], adds, atol=1e-4, rtol=1e-3)
            assert (found[part] == found[:, top, left, None, None]).all()


def test_grad_cam_sees_the_channel_that_spoke_for_the_label() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():  # channel 0 likes light, channel 1 likes the dark
        net[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    pixels = torch.zeros(1, 1, 4, 4)
    pixels[0, 0, 1, 2] = 1
    light = explanation.grad_cam(net, pixels, torch.tensor([0]))
    assert light.flatten().argmax() == 6
    assert (light >= 0).all()
    assert not explanation.grad_cam(net, pixels, torch.tensor([1])).any()


def test_grad_cam_needs_a_convolution() -> None:
    net, _ = linear(4, 4)
    with pytest.raises(ConfigError, match="another method"):
        explanation.grad_cam(net, torch.rand(1, 1, 4, 4), torch.tensor([0]))


def test_an_explanation_has_the_answer_of_the_classifier(explainer: Path, folder: Path) -> None:
    images = pictures(4)
    plain = image.load(folder).predict_batch(images)
    told = explanation.load(explainer).predict_batch(images)
    method = explanation.json.loads((explainer / explanation.EXPLANATION).read_text())["method"]
    for one, other in zip(told, plain, strict=True):
        assert one["label"] == other["label"]  # type: ignore[call-overload,index]
        assert one["method"] == method  # type: ignore[call-overload,index]
        heatmap = torch.tensor(one["heatmap"])  # type: ignore[call-overload,index]
        assert heatmap.shape == (28, 28)
        assert heatmap.abs().max() == 1


def test_what_else_is_in_the_batch_does_not_matter(explainer: Path) -> None:
    predictor = explanation.load(explainer)
    images = pictures(3)
    alone = [predictor.predict_batch([one])[0] for one in images]
    assert predictor.predict_batch(images[::-1])[::-1] == alone
    assert predictor.predict_batch([]) == []


def test_an_empty_image_has_a_finite_explanation(explainer: Path) -> None:
    (answer,) = explanation.load(explainer).predict_batch([[0] * 784])
    values = [v for row in answer["heatmap"] for v in row]  # type: ignore[call-overload,index,union-attr]
    assert all(math.isfinite(v) and -1 <= v <= 1 for v in values)


def test_a_bad_image_is_named(explainer: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        explanation.load(explainer).predict_batch([*pictures(1), [1, 2]])
    assert caught.value.details["index"] == 1


def test_an_unknown_method_is_refused(folder: Path, tmp_path: Path) -> None:
    explanation.save(tmp_path, folder, method="reading-tea-leaves")
    with pytest.raises(ConfigError, match=r"reading-tea-leaves.*grad-cam"):
        explanation.load(tmp_path)
    (tmp_path / explanation.EXPLANATION).unlink()
    with pytest.raises(ConfigError, match="cannot be used"):
        explanation.load(tmp_path)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_lime_covers_images_of_any_size(seed: int, height: int, width: int) -> None:
    net, _ = linear(height, width)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, 1, height, width, generator=generator)
    found = explanation.Lime(samples=40)(net, pixels, torch.tensor([0]))
    assert found.shape == (1, height, width)
    assert found.isfinite().all()
