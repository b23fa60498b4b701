"""The schema of serve_config.yaml: what is wrong is named, with the value and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import GenerateModel, parse
from models.contracts import Priority
from models.errors import ConfigError

ROOT = Path(__file__).parents[1]
MODEL: dict[str, Any] = {"task": "generate", "source": "./model"}


def test_the_file_in_the_repository_is_right() -> None:
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config = parse(document["applications"][0]["args"])
    assert set(config.models) == {"smollm2", "minilm"}


def test_the_specification_is_the_default() -> None:
    model = parse({"models": {"m": MODEL}}).models["m"]
    assert isinstance(model, GenerateModel)
    classes = model.queue.classes()
    assert [classes[p].capacity for p in Priority] == [100, 1000, 500]
    assert [classes[p].timeout_s for p in Priority] == [5, 30, 60]


@pytest.mark.parametrize(
    ("args", "key", "words"),
    [
        ({"models": {"m": {**MODEL, "engin": {}}}}, "models.m", "engin"),
        ({"models": {"m": {**MODEL, "engine": {"slots": 0}}}}, "engine.slots", "greater"),
        ({"models": {"m": {**MODEL, "replicas": {"min": 3, "max": 2}}}}, "replicas", "below min"),
        ({"models": {"m": {"task": "sing", "source": "x"}}}, "models.m", "sing"),
        ({"models": {"m": {"task": "predict", "source": "wheel:x"}}}, "source", "registry:NAME"),
        ({"models": {"m": {"task": "predict", "sauce": "./x"}}}, "predict.sauce", "not permitted"),
        ({"models": {"m": MODEL}, "registry": {"refresh_s": 0}}, "registry.refresh_s", "greater"),
        ({"models": {"gateway": MODEL}}, "", "cannot be named 'gateway'"),
        ({"models": {"a/b": MODEL}}, "models.a/b", "pattern"),
        ({"models": {}}, "models", "at least 1"),
        ({"modles": {"m": MODEL}}, "modles", "not permitted"),
        ("nonsense", "", "dictionary"),
    ],
)
def test_a_mistake_is_named(args: object, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(args)
    assert key in refusal.value.message
    assert words in refusal.value.message
