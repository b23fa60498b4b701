"""Rounds: who is in them, that a secure sum changes nothing, losses, resuming, privacy."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.predictors import image
from train.context import Context
from train.data import digits
from train.data.digits import Digits
from train.events import Reported
from train.recipe import Save
from train.recipes.federated import RECIPE, Federated, client, rounds

QUICK = Federated(clients=4, rounds=2, epochs=1, batch_size=25)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Digits:
    """The real images, but few of them."""
    whole = digits.load()
    small = Digits(
        train_images=whole.train_images[:200],
        train_labels=whole.train_labels[:200],
        test_images=whole.test_images[:100],
        test_labels=whole.test_labels[:100],
    )
    monkeypatch.setattr(digits, "load", lambda: small)
    return small


def elsewhere(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """As a worker process gets its work and sends its answer."""
    again = pickle.loads(pickle.dumps(function))
    return [pickle.loads(pickle.dumps(again(pickle.loads(pickle.dumps(i))))) for i in items]


def run(config: Federated, out: Path, **circumstances: Any) -> tuple[dict[str, float], bytes]:
    context = Context(out=out, **circumstances)
    metrics = dict(RECIPE.run(config, context))
    return metrics, (context.artifact / image.WEIGHTS).read_bytes()


def test_each_client_knows_few_digits_and_each_image_has_one_client() -> None:
    labels = digits.load().train_labels
    config = Federated()
    parts = rounds.shards(labels, config)
    assert sorted(np.concatenate(parts).tolist()) == list(range(4000))
    assert [len(part) for part in parts] == [200] * 20
    assert {len(set(labels[part].tolist())) for part in parts} <= {1, 2}
    again = rounds.shards(labels, config.model_copy(update={"seed": 1}))
    assert [part.tolist() for part in again] != [part.tolist() for part in parts]


@pytest.mark.usefixtures("few")
def test_a_secure_sum_is_the_plain_sum(tmp_path: Path) -> None:
    plain = run(QUICK.model_copy(update={"secure": False}), tmp_path / "plain")
    assert run(QUICK, tmp_path / "secure", fan_out=elsewhere) == plain


@pytest.mark.usefixtures("few")
def test_who_is_gone_is_missing_from_the_sum_and_nothing_else(tmp_path: Path) -> None:
    losing = Federated(clients=6, rounds=1, batch_size=25, dropout=0.2, seed=1, learning_rate=0.5)
    reports: list[Reported] = []
    plain, weights = run(
        losing.model_copy(update={"secure": False}),
        tmp_path / "plain",
        on_report=lambda report, save: reports.append(report),
    )
    assert reports[0].metrics["answers"] == 5
    assert run(losing, tmp_path / "secure") == (plain, weights)
    _, all_of_them = run(losing.model_copy(update={"dropout": 0.0}), tmp_path / "all")
    assert all_of_them != weights


def test_a_round_that_lost_too_many_changes_nothing(few: Digits, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"dropout": 0.8})
    weights = client.flat(image.build(image.ARCHITECTURE))
    parts = rounds.shards(few.train_labels, config)
    outcomes = []
    for number in range(20):
        works, members = rounds.plan(
            config, number, weights, parts, few.train_images, few.train_labels
        )
        if len(works) < rounds.threshold(4):
            outcomes.append(rounds.collect(config, works, members, Context(out=tmp_path)))
    assert len(outcomes) > 10
    assert set(outcomes) == {None}


@pytest.mark.usefixtures("few")
def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop_after_one(report: Reported, save: Save | None) -> None:
        assert save is not None
        (tmp_path / "checkpoint").mkdir()
        save(tmp_path / "checkpoint")
        raise Interrupted

    with pytest.raises(Interrupted):
        run(QUICK, tmp_path / "first", on_report=stop_after_one)
    resumed = run(QUICK, tmp_path / "second", checkpoint=tmp_path / "checkpoint")
    assert resumed == run(QUICK, tmp_path / "undisturbed")


def work(few: Digits, **changed: Any) -> client.Work:
    net = image.build(image.ARCHITECTURE)
    works, _ = rounds.plan(
        QUICK,
        0,
        client.flat(net),
        rounds.shards(few.train_labels, QUICK),
        few.train_images,
        few.train_labels,
    )
    return dataclasses.replace(works[0], **changed)


def test_work_is_repeatable_and_leaves_the_global_model_alone(few: Digits) -> None:
    one = work(few)
    before = one.weights.copy()
    assert client.answer(one).tolist() == client.answer(one).tolist()
    assert one.weights.tolist() == before.tolist()


def test_fedprox_stays_closer_to_the_global_model(few: Digits) -> None:
    free = client.train(work(few))
    held = client.train(work(few, proximal=10.0))
    assert 0 < np.linalg.norm(held) < 0.9 * np.linalg.norm(free)


def test_a_clipped_update_is_no_longer_than_allowed(few: Digits) -> None:
    answer = client.answer(work(few, clip=0.01, pads=None))
    update = client.secure.decode(answer)[:-1]
    assert np.linalg.norm(update) == pytest.approx(0.01, rel=1e-2)


@pytest.mark.usefixtures("few")
def test_noise_is_private_only_when_nobody_can_repeat_it(tmp_path: Path) -> None:
    noisy = Federated(clients=4, rounds=1, epochs=1, batch_size=50, clip=0.1, noise=1.0)
    private, weights = run(noisy, tmp_path / "private")
    assert private["epsilon"] > 0
    _, others = run(noisy, tmp_path / "other")
    assert weights != others
    known = noisy.model_copy(update={"noise_seed": 1})
    repeated = run(known, tmp_path / "known")
    assert "epsilon" not in repeated[0]
    assert run(known, tmp_path / "again") == repeated


def test_noise_in_the_sum_is_as_large_as_said(few: Digits, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"clip": 1e-3, "noise": 500.0, "noise_seed": 0})
    works, members = rounds.plan(
        config,
        0,
        client.flat(image.build(image.ARCHITECTURE)),
        rounds.shards(few.train_labels, config),
        few.train_images,
        few.train_labels,
    )
    step = rounds.collect(config, works, members, Context(out=tmp_path))
    assert step is not None
    # all four answered where three would do: sqrt(4 / 3) of the noise, over 4 clients
    assert np.std(step) == pytest.approx(0.5 * (4 / 3) ** 0.5 / 4, rel=0.05)


def test_noise_without_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="set clip, too"):
        Federated(noise=1.0)


@pytest.mark.usefixtures("few")
def test_the_artifact_is_an_image_classifier(tmp_path: Path) -> None:
    run(QUICK.model_copy(update={"rounds": 1}), tmp_path)
    assert load_file(tmp_path / "artifact" / image.WEIGHTS)
    (answer,) = RECIPE.load(tmp_path / "artifact").predict_batch([RECIPE.sample[0]])  # type: ignore[misc]
    assert 0 <= answer["label"] <= 9  # type: ignore[index,call-overload,operator]
