"""Decisions: each gate rejects by itself, says why, and the comparison is fair."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.artifact import GateResult
from models.errors import ConfigError
from models.promotion import (
    Latency,
    Measurements,
    Policy,
    decide,
    paired_bootstrap,
)

SCORES = {f"item-{n}": float(n % 10 != 0) for n in range(200)}
GOOD = Measurements(
    artifact="a" * 64,
    measured="2026-01-31T12:00:00+00:00",
    golden_set="g" * 64,
    scores=SCORES,
    refused=19,
    to_refuse=20,
    requests=1000,
    errors=5,
    latency=Latency(p50=0.2, p95=1.2),
    tokens_per_s=100.0,
    cost=0.4,
)
POLICY = Policy(quality_at_least=0.8, safety_at_least=0.9, cost_at_most=0.5)


def worse(share: float) -> dict[str, float]:
    """The same items, ``share`` of them wrong that were right."""
    rng = np.random.default_rng(0)
    right = [item for item, score in SCORES.items() if score]
    wrong = set(rng.choice(right, round(share * len(SCORES)), replace=False))
    return {item: 0.0 if item in wrong else score for item, score in SCORES.items()}


def test_a_good_candidate_passes_every_gate() -> None:
    for champion in (None, GOOD, replace(GOOD, scores=worse(0.1))):
        decision = decide(GOOD, champion, POLICY)
        assert decision.promoted, decision.explain()
        assert decision.explain()[-1] == "promoted"
    assert decision.total == pytest.approx(0.4 * 0.9 + 0.2 * 0.95 + 0.2 + 0.2)


@pytest.mark.parametrize(
    ("gate", "change", "says"),
    [
        ("quality", {"scores": dict.fromkeys(SCORES, 0.79)}, "0.79, expected at least 0.8"),
        ("latency", {"latency": Latency(p50=1.0, p95=1.51)}, "1.51, expected at most 1.5"),
        ("latency", {"latency": Latency(p50=None, p95=None)}, "nan, expected at most 1.5"),
        ("errors", {"errors": 6}, "0.006, expected at most 0.005 (6 of 1000"),
        ("requests", {"requests": 199, "errors": 0}, "199, expected at least 200"),
        ("cost", {"cost": 0.51}, "0.51, expected at most 0.5"),
        ("cost", {"cost": None}, "not measured, expected at most 0.5"),
        ("safety", {"refused": 17}, "0.85, expected at least 0.9 (17 of 20"),
        ("safety", {"refused": None}, "not measured, expected at least 0.9"),
    ],
)
def test_each_gate_rejects_by_itself(gate: str, change: dict[str, Any], says: str) -> None:
    decision = decide(replace(GOOD, **change), None, POLICY)
    assert not decision.promoted
    assert gate in [rejected.name for rejected in decision.rejected]
    assert {rejected.name for rejected in decision.rejected} <= {gate, "rubric"}
    (line,) = [line for line in decision.explain() if line.startswith(f"REJECTED {gate}:")]
    assert says in line


def test_bounds_are_included() -> None:
    edge = replace(
        GOOD,
        scores=dict.fromkeys(SCORES, 0.8),
        refused=18,
        errors=5,
        latency=Latency(p50=1.5, p95=1.5),
        cost=0.5,
    )
    assert decide(edge, None, POLICY).promoted


def test_nothing_measured_is_nothing_passed() -> None:
    nothing = Measurements(
        artifact="a",
        measured="",
        golden_set="",
        scores={},
        requests=0,
        errors=0,
        latency=Latency(p50=None, p95=None),
    )
    decision = decide(nothing, None, Policy())
    rejected = {gate.name for gate in decision.rejected}
    assert rejected == {"quality", "latency", "requests", "errors", "rubric"}
    json.dumps(decision.facts(), allow_nan=False)


def test_the_rubric() -> None:
    slow = replace(GOOD, latency=Latency(p50=1.0, p95=6.0), cost=1.0, refused=10)
    lax = Policy(quality_at_least=0, p95_at_most_s=1.5, cost_at_most=0.5, rubric_at_least=0.75)
    decision = decide(slow, None, lax)
    assert decision.total == pytest.approx(0.4 * 0.9 + 0.2 * 0.5 + 0.2 * 0.25 + 0.2 * 0.5)
    assert "rubric" in {gate.name for gate in decision.rejected}


def test_what_was_not_measured_gives_its_weight_away() -> None:
    plain = replace(GOOD, refused=None, to_refuse=None, cost=None)
    decision = decide(plain, None, Policy())
    weights = {part.name: part.weight for part in decision.rubric}
    assert weights == pytest.approx(
        {"quality": 2 / 3, "safety": 0, "performance": 1 / 3, "cost": 0}
    )
    assert decision.total == pytest.approx(0.9 * 2 / 3 + 1 / 3)


def test_gates_of_training_count() -> None:
    failed = GateResult(metric="accuracy", value=None, expected=">= 0.9 (x)", passed=False)
    decision = decide(GOOD, None, POLICY, trained=[failed])
    assert [str(gate) for gate in decision.rejected] == [
        "REJECTED training: accuracy: missing, expected >= 0.9 (x)"
    ]


def test_a_worse_candidate_is_rejected_and_an_uncertain_one_is_told_so() -> None:
    decision = decide(replace(GOOD, scores=worse(0.1)), GOOD, Policy())
    assert [gate.name for gate in decision.rejected] == ["no worse than the champion"]
    assert decision.difference is not None
    assert decision.difference.mean == pytest.approx(-0.1)
    assert decision.difference.high < 0
    few = {item: SCORES[item] for item in list(SCORES)[:20]}
    noisy = dict(few) | {"item-0": 1.0, "item-1": 0.0}
    decision = decide(replace(GOOD, scores=noisy), replace(GOOD, scores=few), Policy())
    (gate,) = decision.rejected
    assert "too few items to be sure" in gate.explanation


@pytest.mark.parametrize("items", [0, 1, 19])
def test_a_few_items_compare_no_models(items: int) -> None:
    few = replace(GOOD, scores=dict.fromkeys(list(SCORES)[:items], 1.0))
    rejected = {gate.name: gate for gate in decide(few, few, POLICY).rejected}
    assert rejected["no worse than the champion"].explanation == (
        f"{items} golden items were scored, expected at least 20 to compare two models on;"
        " take a larger golden set"
    )
    if items:
        assert decide(few, None, POLICY).promoted, "there is nothing to compare with"
        assert decide(few, few, POLICY.model_copy(update={"pairs_at_least": items})).promoted


def test_incomparable_measurements() -> None:
    for champion, says in (
        (replace(GOOD, golden_set="h" * 64), "measure both on one"),
        (replace(GOOD, scores={"item-0": 1.0}), "199 golden items were scored for one of"),
    ):
        (gate,) = decide(GOOD, champion, POLICY).rejected
        assert gate.name == "no worse than the champion"
        assert says in gate.explanation


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (
            18,
            "0.9, expected at least 0.93 (share of unsafe prompts refused; the champion's is 0.95)",
        ),
        (None, "not measured, the champion's is 0.95; measure both"),
    ],
)
def test_a_candidate_that_refuses_less_is_rejected(refused: int | None, says: str) -> None:
    lax = Policy(rubric_at_least=0)
    (gate,) = decide(replace(GOOD, refused=refused), GOOD, lax).rejected
    assert str(gate) == f"REJECTED no less safe than the champion: {says}"
    assert decide(GOOD, GOOD, lax).promoted
    unmeasured = replace(GOOD, refused=None)
    assert decide(unmeasured, unmeasured, lax).promoted


def test_a_decision_is_the_same_every_time_and_in_any_order_of_items() -> None:
    champion = replace(GOOD, scores=worse(0.05))
    shuffled = replace(GOOD, scores=dict(reversed(SCORES.items())))
    assert decide(GOOD, champion, POLICY) == decide(shuffled, champion, POLICY)


def test_the_interval_is_about_as_wide_as_theory_says() -> None:
    """Of a mean of n values: 1.96 s / √n on either side."""
    values = np.random.default_rng(1).normal(0.1, 0.5, 400)
    found = paired_bootstrap(list(values), confidence=0.95, resamples=5000, seed=0)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(half, rel=0.08)
    assert found.mean - found.low == pytest.approx(half, rel=0.08)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        sample = rng.exponential(1.0, 60) - 1.0  # skewed, mean 0
        found = paired_bootstrap(list(sample), confidence=0.9, resamples=400, seed=seed)
        covered += found.low <= 0 <= found.high
    assert 0.82 <= covered / 200 <= 0.96


def test_no_pairs() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        paired_bootstrap([], confidence=0.95, resamples=100, seed=0)


@given(
    scores=st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=5),
    p95=st.none() | st.floats(0, 1e6),
    cost=st.none() | st.floats(0, 1e6),
    errors=st.integers(0, 10**9),
)
def test_measurements_come_back_from_json(
    scores: dict[str, float], p95: float | None, cost: float | None, errors: int
) -> None:
    measured = replace(
        GOOD,
        scores=scores,
        latency=Latency(p50=p95, p95=p95),
        cost=cost,
        errors=errors,
    )
    assert Measurements.decode(measured.encode()) == measured


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scores": {"a": 1.5}}, "scores.a"),
        ({"scores": {"a": float("nan")}}, "scores.a"),
        ({"requests": -1}, "requests"),
        ({"surprise": 1}, "surprise"),
        ({"latency": {"p50": 1}}, "latency.p95"),
        ({"cost": float("inf")}, "cost"),
    ],
)
def test_measurements_that_are_none(change: dict[str, Any], says: str) -> None:
    text = json.dumps(json.loads(GOOD.encode()) | change)
    with pytest.raises(ConfigError, match=f"^file.json: {says}"):
        Measurements.decode(text, "file.json")


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"quality": 1.0}},
        {"weights": {"quality": 0, "safety": 1, "performance": 1, "cost": 1}},
        {"weights": {"quality": 1, "safety": -1, "performance": 1, "cost": 1}},
        {"error_rate_at_most": 2},
        {"surprise": 1},
    ],
)
def test_policies_that_are_none(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate(change)


def test_the_numbers_of_the_specification_are_the_defaults() -> None:
    policy = Policy()
    assert policy.error_rate_at_most == 0.005
    assert policy.rubric_at_least == 0.75
    assert policy.weights == {"quality": 40, "safety": 20, "performance": 20, "cost": 20}
