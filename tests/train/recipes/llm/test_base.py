"""A base model of the registry: one version for the whole run, kept, and a parent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import yaml

from models import artifact
from models.artifact import Facts
from models.registry import open_registry
from models.store import publish
from tests import tiny_models
from tests.train.collecting import archive_and_collect, uses
from tests.train.recipes.llm.experiment import Stopped
from train import __main__ as cli
from train.recipes.llm.callbacks import Callback, StepEnd

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def base(tmp_path: Path) -> str:
    """The content hash of ``base@1``, which is the champion."""
    folder = tiny_models.make("llama", tmp_path / "base", context=128)
    manifest = artifact.seal(folder, Facts(name="base", kind="causal-lm"))
    uri = publish(folder)

    async def register() -> None:
        async with open_registry() as registry:
            version = await registry.register(manifest, uri, by="test")
            await registry.promote(str(version), "champion", expected=None, by="test", approve=True)

    asyncio.run(register())
    return manifest.content_sha256


class Collector(Callback):
    """Somebody archives the base model after the second step; the first time, the run ends."""

    kept: list[bool] = []

    def on_step(self, event: StepEnd) -> None:
        if event.step == 2:
            self.kept.append(archive_and_collect("base@1"))
            if len(self.kept) == 1:
                raise Stopped


def experiment(text: Path, source: str, **training: object) -> list[str]:
    """As words of ``python -m train``."""
    settings = {
        "model.source": source,
        "data.train": str(text),
        "logging.every": 1,
        **{f"training.{key}": value for key, value in training.items()},
    }
    words = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    sizes = [f"--set=training.{word}" for word in ("steps=3", "sequence_length=96", "batch_size=2")]
    return ["llm", *words, *sizes]


def test_a_base_of_the_registry_is_pinned_held_and_a_parent(
    text: Path, base: str, tmp_path: Path
) -> None:
    Collector.kept.clear()
    out = tmp_path / "run"
    words = experiment(text, "registry:base@champion", callbacks=[f"{__name__}:Collector"])
    assert cli.main([*words, "--out", str(out)]) == 3
    assert Collector.kept == [True]
    (use,) = uses()
    assert (use.name, use.replica, use.artifact) == ("run", "model.source", base)
    asked = yaml.safe_load((out / "config.yaml").read_text())
    assert asked["config"]["model"]["source"] == "registry:base@1"

    # It goes on with what nobody may begin with any more.
    assert cli.main(["--resume", str(out)]) in (cli.PASSED, cli.GATES_FAILED)
    assert Collector.kept == [True, True]
    assert uses() == []
    assert artifact.read(out / "artifact").parents == (base,)
    adapter = json.loads((out / "artifact" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "registry:base@1"
    assert cli.main([*words, "--out", str(tmp_path / "other")]) == cli.FAILED
    assert not archive_and_collect("base@1")


def test_a_model_of_an_earlier_run_is_a_parent_too(text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    whole = experiment(text, "tiny", sequence_length=96)
    words = [*whole, "--set=model.adapter=none", "--set=training.optimiser.learning_rate=1e-2"]
    cli.main([*words, "--out", str(first)])
    made = artifact.read(first / "artifact")
    assert made.parents == ()
    cli.main([*experiment(text, f"{first}/artifact"), "--out", str(second)])
    assert artifact.read(second / "artifact").parents == (made.content_sha256,)
