"""Rounds: who is in them, that a secure sum changes nothing, losses, resuming, privacy."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.predictors import image
from train.context import Context, Enlist, Here
from train.data import digits
from train.data.digits import Digits
from train.events import Reported
from train.recipe import Actors, Save
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


class Elsewhere(Here):
    """Clients in another process: of everything that crosses, what was sent is kept."""

    wire: ClassVar[list[bytes]] = []

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        sent = pickle.dumps(arguments)
        back = pickle.dumps(super().call(method, pickle.loads(sent)))
        self.wire.extend([sent, back])
        answers: dict[int, Any] = pickle.loads(back)
        return answers


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


def elsewhere(made: list[client.Client] | None = None) -> Enlist:
    @contextmanager
    def enlist(make: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Actors]:
        objects = [pickle.loads(pickle.dumps(make))(item) for item in items]
        if made is not None:
            made.extend(objects)
        yield Elsewhere(objects)

    return enlist


@pytest.mark.usefixtures("few")
def test_a_secure_sum_is_the_plain_sum(tmp_path: Path) -> None:
    plain = run(QUICK.model_copy(update={"secure": False}), tmp_path / "plain")
    assert run(QUICK, tmp_path / "secure", enlist=elsewhere()) == plain


@pytest.mark.usefixtures("few")
def test_what_is_secret_never_leaves_its_client(tmp_path: Path) -> None:
    """Neither through the server nor to another client: what crosses has no trace of it."""
    clients: list[client.Client] = []
    Elsewhere.wire.clear()
    secrets: set[bytes] = set()

    def remember(report: Reported, save: Save | None) -> None:
        for each in clients:
            assert each._member is not None
            pads = each._member.pads()
            secrets.update([each._member._mask_key, each._member._letter_key, pads.own])
            secrets.update([*pads.added, *pads.subtracted])

    run(QUICK, tmp_path, enlist=elsewhere(clients), on_report=remember)
    assert len(secrets) == 2 * (3 * 4 + 4 * 3 // 2)  # new ones in both rounds
    assert not [secret for secret in secrets for sent in Elsewhere.wire if secret in sent]
    images = [row.tobytes() for each in clients for row in each._images]
    assert not [image for image in images for sent in Elsewhere.wire if image in sent]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("method", ["keys", "deal", "receive", "answer", "open"])
def test_a_process_that_is_lost_costs_its_clients_the_round(tmp_path: Path, method: str) -> None:
    """It is made anew, and has forgotten its secrets; the others end the round if they can."""
    config = Federated(clients=4, rounds=2, epochs=1, batch_size=25)
    lost: list[str] = []
    reports: list[Reported] = []

    class Mortal(Here):
        def call(self, name: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
            answers = super().call(name, arguments)
            if name == method and not lost:
                lost.append(name)
                self.objects[1]._member = None
                del answers[1]
            return answers

    @contextmanager
    def mortal(make: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Actors]:
        yield Mortal([make(item) for item in items])

    run(config, tmp_path, enlist=mortal, on_report=lambda report, save: reports.append(report))
    assert lost
    whole = {"keys": 0.0, "deal": 0.0, "receive": 0.0, "answer": 3.0, "open": 4.0}
    assert [report.metrics["answers"] for report in reports] == [whole[method], 4.0]


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


def clients_of(config: Federated, few: Digits) -> Here:
    parts = rounds.shards(few.train_labels, config)
    return Here([client.Client(config, who) for who in enumerate(parts)])


def learned(config: Federated, few: Digits, number: int = 0) -> tuple[Any, int]:
    """The step of a round, and how many answered."""
    weights = client.flat(image.build(image.ARCHITECTURE))
    sizes = [len(part) for part in rounds.shards(few.train_labels, config)]
    return rounds.learn(config, number, weights, sizes, clients_of(config, few))


def test_a_round_that_lost_too_many_changes_nothing(few: Digits) -> None:
    config = QUICK.model_copy(update={"dropout": 0.8})
    outcomes = [
        learned(config, few, number)
        for number in range(20)
        if len(rounds.draw(config, number)[1]) < rounds.threshold(4)
    ]
    assert len(outcomes) > 10
    assert {step for step, _ in outcomes} == {None}
    assert all(answers < 3 for _, answers in outcomes)


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


WORK = client.Work(
    net=image.ARCHITECTURE,
    weights=client.flat(image.build(image.ARCHITECTURE)),
    seed=(0, 0),
    members=4,
    share=1.0,
    least=3,
    noise_seed=None,
)


def one_of(few: Digits, **changed: Any) -> client.Client:
    """A client whose answers are not masked."""
    config = QUICK.model_copy(update={"secure": False, **changed})
    return clients_of(config, few).objects[0]  # type: ignore[no-any-return]


def test_work_is_repeatable_and_leaves_the_global_model_alone(few: Digits) -> None:
    one, before = one_of(few), WORK.weights.copy()
    first, second = one.answer(WORK), one.answer(WORK)
    assert first is not None
    assert second is not None
    assert first.tolist() == second.tolist()
    assert WORK.weights.tolist() == before.tolist()


def test_fedprox_stays_closer_to_the_global_model(few: Digits) -> None:
    free = one_of(few).train(WORK)
    held = one_of(few, proximal=10.0).train(WORK)
    assert 0 < np.linalg.norm(held) < 0.9 * np.linalg.norm(free)


def test_a_clipped_update_is_no_longer_than_allowed(few: Digits) -> None:
    answer = one_of(few, clip=0.01).answer(WORK)
    assert answer is not None
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


def test_noise_in_the_sum_is_as_large_as_said(few: Digits) -> None:
    step, _ = learned(QUICK.model_copy(update={"clip": 1e-3, "noise": 500.0, "noise_seed": 0}), few)
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
