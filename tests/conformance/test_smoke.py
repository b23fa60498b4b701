"""What every recipe promises, held against its smoke run and the artifact of that."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models import artifact
from models.artifact import GateResult
from tests.conformance.conftest import Rehearsals, Smoke, once, same, several
from tests.conformance.rehearsal import NONSENSE
from train import history
from train.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CPU_S = 60.0
"""Of a smoke run, at most, with all that it imports."""


@pytest.fixture
def smoke(recipe: Recipe[Any], rehearsals: Rehearsals) -> Smoke:
    return rehearsals.smoke(recipe)


def test_it_is_quick(smoke: Smoke) -> None:
    assert smoke.found["cpu_s"] < CPU_S


def test_its_gates_pass(smoke: Smoke) -> None:
    assert smoke.found["failed"] == [], smoke.found["metrics"]


def test_the_same_seed_gives_the_same_metrics(
    recipe: Recipe[Any], smoke: Smoke, rehearsals: Rehearsals
) -> None:
    again = rehearsals.smoke(recipe, "second", PYTHONHASHSEED="7")
    assert again.found["metrics"] == smoke.found["metrics"]


def test_it_reports_what_its_gates_judge(recipe: Recipe[Any], smoke: Smoke) -> None:
    assert recipe.gates.keys() <= smoke.found["metrics"].keys()


def test_nothing_is_written_elsewhere(smoke: Smoke) -> None:
    assert smoke.found["elsewhere"] == []
    left = [
        str(path.relative_to(smoke.folder))
        for place in ("home", "here", "tmp")
        for path in (smoke.folder / place).rglob("*")
        if path.is_file() or path.is_symlink()
    ]
    assert left == []


def test_its_steps_increase(smoke: Smoke) -> None:
    steps = [report.step for report in history.read(smoke.folder / "out")]
    assert steps == sorted(set(steps))


def test_the_artifact_is_whole(recipe: Recipe[Any], smoke: Smoke) -> None:
    if not smoke.artifact.exists() or not any(smoke.artifact.iterdir()):
        assert recipe.load is None
        pytest.skip("makes no artifact")
    manifest = artifact.verify(smoke.artifact)
    assert manifest.kind == recipe.kind
    assert all(isinstance(gate, GateResult) for gate in manifest.gates)
    assert len(manifest.parents) == len(recipe.inputs)


@pytest.fixture
def answers(recipe: Recipe[Any], smoke: Smoke) -> dict[str, Any]:
    """Of the artifact in a process that has nothing of training in it."""
    if recipe.load is None:
        pytest.skip("predicts nothing")
    samples = smoke.folder / "samples.json"
    samples.write_text(json.dumps(several(recipe.sample)))
    words = ("predict", str(smoke.artifact), str(samples))
    found: dict[str, Any] = once(smoke.folder / "fresh", *words)
    return found


def test_it_predicts_in_a_fresh_process_without_training(answers: dict[str, Any]) -> None:
    assert answers["strangers"] == []


def test_one_output_an_input_in_order(answers: dict[str, Any]) -> None:
    together = answers["together"]
    assert len(answers["alone"]) == len(together)
    assert same(answers["again"], together)
    assert same(answers["backwards"][::-1], together)
    assert answers["nothing"] == []


def test_an_output_does_not_depend_on_the_batch(answers: dict[str, Any]) -> None:
    assert same(answers["alone"], answers["together"])
    assert same(answers["threefold"], answers["together"] * 3)


def test_bad_input_is_refused_by_its_place(answers: dict[str, Any]) -> None:
    refusals = dict(zip(map(repr, NONSENSE), answers["refusals"], strict=True))
    for bad, refusal in refusals.items():
        assert "raised" not in refusal, bad
        if "answered" not in refusal:
            assert refusal["index"] == 1, bad
            assert refusal["message"]
    for bad in map(repr, NONSENSE[:2]):
        assert "answered" not in refusals[bad], bad


def test_same_sees_differences() -> None:
    assert same([{"a": 1.0}], [{"a": 1.0 + 1e-9}])
    assert not same([{"a": 1.0}], [{"a": 1.1}])
    assert not same([1], [1, 1])
    assert not same({"a": 1}, {"b": 1})
