"""A run depends on its configuration and step numbers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.errors import ConfigError
from tests.train.recipes.llm.experiment import Keeper, Stopped, config, train
from train.recipes.llm.callbacks import Callback, EpochEnd, EvalEnd, StepEnd

pytestmark = pytest.mark.integration


def test_the_same_seed_gives_the_same_metrics(text: Path, tmp_path: Path) -> None:
    first = train(config(text, seed=3), tmp_path / "a")
    torch.manual_seed(99)  # whatever went on in the process before
    second = train(config(text, seed=3), tmp_path / "b")
    other = train(config(text, seed=4), tmp_path / "c")
    assert first == second
    assert first[1] != other[1]
    assert first[0]["base_loss"] == other[0]["base_loss"], "the same text is held out"
    assert first[0]["perplexity_ratio"] < 1


@pytest.mark.parametrize(
    ("adapter", "optimiser"),
    [
        ("lora", "adamw"),
        ("none", "adamw"),
        ("none", "lion"),
        ("none", "sgd"),
        ("lora", "adafactor"),
    ],
)
def test_an_interrupted_run_ends_with_the_same_curve(
    text: Path, tmp_path: Path, adapter: str, optimiser: str
) -> None:
    """Interrupted two steps after its last checkpoint, in the middle of an epoch."""
    rate = {"adamw": 1e-2, "lion": 1e-3, "sgd": 1e-2, "adafactor": 1e-2}[optimiser]
    settings = config(
        text,
        model={"adapter": adapter},
        steps=9,
        evaluate_every=2,
        checkpoint_every=3,
        optimiser={"name": optimiser, "learning_rate": rate},
    )
    whole, curve = train(settings, tmp_path / "whole")
    keeper = Keeper(tmp_path / "kept", stop_after=5)
    with pytest.raises(Stopped):
        train(settings, tmp_path / "cut", keeper=keeper)
    assert keeper.checkpoint is not None
    assert keeper.checkpoint.name == "step-3"
    metrics, rest = train(settings, tmp_path / "cut", checkpoint=keeper.checkpoint)
    assert rest == curve[3:]
    assert metrics == whole
    artifact = "model.safetensors" if adapter == "none" else "adapter_model.safetensors"
    files = [tmp_path / run / "artifact" / artifact for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_interrupted_after_its_last_step_still_leaves_its_artifact(
    text: Path, tmp_path: Path
) -> None:
    keeper = Keeper(tmp_path / "kept", stop_after=6)
    with pytest.raises(Stopped):
        train(config(text), tmp_path / "cut", keeper=keeper)
    assert not list((tmp_path / "cut" / "artifact").iterdir())
    metrics, rest = train(config(text), tmp_path / "cut", checkpoint=keeper.checkpoint)
    assert rest == []
    assert metrics == train(config(text), tmp_path / "whole")[0]
    assert (tmp_path / "cut" / "artifact" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 4},
        {"model": {"activation_checkpointing": True}},
    ],
    ids=["accumulation", "activation checkpointing"],
)
def test_how_a_step_is_computed_does_not_change_it(
    text: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    """Without dropout, which is drawn a forward pass; token weights differ from row to row."""
    still = {"lora": {"dropout": 0}}
    model = still | (change.pop("model", None) or {})  # type: ignore[operator]
    _, expected = train(config(text, model=still), tmp_path / "a")
    _, losses = train(config(text, model=model, **change), tmp_path / "b")
    assert losses == pytest.approx(expected, abs=2e-6)


def test_packing_changes_neither_what_is_seen_nor_its_loss(text: Path, tmp_path: Path) -> None:
    """One epoch in one step, packed and not: the mean over the very same tokens."""
    still = {"lora": {"dropout": 0}}
    losses = [
        train(
            config(text, model=still, steps=1, batch_size=size, packing=packing,
                   sequence_length=200),
            tmp_path / str(packing),
        )
        for packing, size in ((True, count_packed(text)), (False, 32))
    ]  # fmt: skip
    assert losses[0][0]["tokens"] == losses[1][0]["tokens"]
    assert losses[0][1] == pytest.approx(losses[1][1], abs=1e-6)


def count_packed(text: Path) -> int:
    from train.recipes.llm import data, tiny
    from train.recipes.llm.packing import Schedule

    prepared = data.load(config(text, sequence_length=200), tiny.tokenizer())
    assert len(prepared.train) == 32, "the test above gives this as its batch size"
    lengths = [data.tokens(unit) for unit in prepared.train]
    return len(Schedule(lengths, limit=200, batch=1, packing=True, seed=0).epoch(0))


@pytest.mark.parametrize(("precision", "adapter"), [("bf16", "lora"), ("fp16", "none")])
def test_half_precision_follows_full_precision(
    text: Path, tmp_path: Path, precision: str, adapter: str
) -> None:
    def settings(kind: str) -> dict[str, object]:
        return {"adapter": adapter, "precision": kind, "lora": {"dropout": 0}}

    _, full = train(config(text, model=settings("fp32")), tmp_path / "full")
    _, half = train(config(text, model=settings(precision)), tmp_path / "half")
    assert half != full, "nothing was computed in half precision"
    assert half == pytest.approx(full, rel=0.02)


def test_evaluation_stops_early_and_the_best_weights_are_kept(text: Path, tmp_path: Path) -> None:
    """A rate that soon destroys the model."""
    keeper = Keeper(tmp_path / "kept")
    ends: list[EvalEnd] = []

    class Watch(Callback):
        def on_eval_end(self, event: EvalEnd) -> None:
            ends.append(event)

    settings = config(
        text,
        steps=40,
        evaluate_every=1,
        patience=3,
        optimiser={"learning_rate": 4, "schedule": "constant", "warmup": 6, "final": 1},
    )
    metrics, losses = train(settings, tmp_path / "run", keeper=keeper, callbacks=[Watch()])
    evaluations = [end.metrics["eval_loss"] for end in ends]
    best = min(range(len(evaluations)), key=evaluations.__getitem__)
    assert [end.step for end in ends if end.best][-1] == best
    assert metrics["best_step"] == best
    assert metrics["eval_loss"] == evaluations[best]
    assert len(losses) == best + 3 < 40
    assert keeper.reports[-1].step == len(losses)
    again, rest = train(settings, tmp_path / "again", checkpoint=keeper.checkpoint)
    assert (again, rest) == (metrics, []), "a run that stopped early has ended"


def test_callbacks_by_name_and_by_object_see_every_moment(text: Path, tmp_path: Path) -> None:
    Witness.seen.clear()
    steps: list[StepEnd] = []

    class Own(Callback):
        def on_step(self, event: StepEnd) -> None:
            steps.append(event)

    settings = config(text, steps=5, evaluate_every=2, clip_norm=1e-3, sequence_length=300)
    metrics, losses = train(settings, tmp_path, callbacks=[Own(), Witness()])
    assert [event.step for event in steps] == [1, 2, 3, 4, 5]
    assert [event.loss for event in steps] == losses
    assert sum(event.tokens for event in steps) == metrics["tokens"]
    assert all(event.grad_norm > 1e-3 for event in steps), "told before clipping"
    kinds = [type(event).__name__ for event in Witness.seen]
    assert kinds.count("EvalEnd") == 4  # before the first step, after 2 and 4, at the end
    epochs = [event.epoch for event in Witness.seen if isinstance(event, EpochEnd)]
    assert epochs == list(range(1, len(epochs) + 1))
    assert epochs


class Witness(Callback):
    seen: list[StepEnd | EpochEnd | EvalEnd] = []

    def on_epoch_end(self, event: EpochEnd) -> None:
        self.seen.append(event)

    def on_eval_end(self, event: EvalEnd) -> None:
        self.seen.append(event)


def test_callbacks_are_found_by_dotted_name(text: Path, tmp_path: Path) -> None:
    name = "tests.train.recipes.llm.experiment:Halt"
    with pytest.raises(Stopped):
        train(config(text, callbacks=[name]), tmp_path)
    with pytest.raises(ConfigError, match=r"training\.callbacks: 'no\.such:Thing' cannot be"):
        train(config(text, callbacks=["no.such:Thing"]), tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_with_advice(text: Path, tmp_path: Path) -> None:
    settings = config(
        text, model={"adapter": "none"}, steps=40, clip_norm=None,
        optimiser={"name": "sgd", "learning_rate": 1e6, "warmup": 0},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"the loss is (nan|inf) in step \d+ of 40; a lower"):
        train(settings, tmp_path)


def test_the_learning_rate_follows_the_schedule_that_is_named(text: Path, tmp_path: Path) -> None:
    rates: list[float] = []

    class Watch(Callback):
        def on_step(self, event: StepEnd) -> None:
            rates.append(event.learning_rate)

    named = "tests.train.recipes.llm.experiment:halving"
    optimiser = {"learning_rate": 0.08, "warmup": 0, "schedule": named}
    train(config(text, steps=4, optimiser=optimiser), tmp_path / "run", callbacks=[Watch()])
    assert rates == pytest.approx([0.08, 0.04, 0.02, 0.01])
    with pytest.raises(ConfigError, match="schedule is 'sudden'; expected one of"):
        train(config(text, optimiser={"schedule": "sudden"}), tmp_path / "other")


def test_quantised_training_without_a_gpu_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qlora needs a CUDA device"):
        train(config(text, model={"adapter": "qlora"}), tmp_path)


def test_reports_say_what_people_watch(text: Path, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "kept")
    train(config(text, steps=4, evaluate_every=2), tmp_path / "run", keeper=keeper)
    assert [report.step for report in keeper.reports] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "epoch"} <= (
        keeper.reports[0].metrics.keys()
    )
    assert {"eval_loss", "perplexity", "perplexity_ratio"} <= keeper.reports[1].metrics.keys()
    assert all(report.total == 4 for report in keeper.reports)
