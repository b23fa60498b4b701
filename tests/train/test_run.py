"""One run, driven in this process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from models import artifact
from models.errors import ConfigError, Unavailable
from tests.train.toys.walk import RECIPE, Walk
from train import data, history
from train.context import Context
from train.events import Event, Reported, RunEnded, RunStarted
from train.folder import RunFolder
from train.recipe import Config, Gate, Metrics, Recipe, RunContext, Workers
from train.run import Task, judge, perform, run

EXPECTED = {
    *("config.yaml", "environment.json", "metrics.jsonl", "result.json"),
    *("checkpoints", "artifact"),
}


def made(body: object, **more: object) -> Recipe[Config]:
    return Recipe(
        name="toy",
        summary="",
        kind="toy",
        config=Config,
        run=body,  # type: ignore[arg-type]
        smoke=Config(),
        **{"gates": {}, **more},  # type: ignore[arg-type]
    )


def test_a_run_leaves_all_that_is_needed_to_make_it_again(tmp_path: Path) -> None:
    events: list[Event] = []
    folder = RunFolder(tmp_path / "a-run")
    result = run(RECIPE, Walk(seed=3, steps=12), folder=folder, subscribers=[events.append])
    assert result.passed
    assert {path.name for path in folder.path.iterdir() if path.name[0] != "."} == EXPECTED
    request = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert Walk(**request["config"]) == Walk(seed=3, steps=12)
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["seed"] == 3
    assert environment["packages"]["pydantic"]
    assert environment["code_revision"]
    assert [type(event) for event in events] == [RunStarted, *[Reported] * 12, RunEnded]
    assert history.read(folder.path) == events[1:-1]
    assert result.manifest is not None
    sealed = artifact.verify(folder.path / "artifact")
    assert sealed == result.manifest
    assert sealed.run is not None
    assert (sealed.run.recipe, sealed.run.seed, sealed.run.id) == ("walk", 3, "a-run")
    assert sealed.config == request["config"]
    assert sealed.passed
    assert sealed.metrics["steps"] == 12
    ended = json.loads((folder.path / "result.json").read_text())
    assert ended["status"] == "passed"
    assert ended["artifact"] == sealed.content_sha256
    assert ended["best_checkpoint"] is None  # nothing reports the gate's metric on the way


def test_the_artifact_of_a_failed_gate_is_sealed_and_marked(tmp_path: Path) -> None:
    events: list[Event] = []
    result = run(
        RECIPE, Walk(steps=3), folder=RunFolder(tmp_path / "r"), subscribers=[events.append]
    )
    assert not result.passed
    (gate,) = artifact.verify(tmp_path / "r" / "artifact").gates
    assert (gate.metric, gate.value, gate.passed) == ("steps", 3.0, False)
    assert gate.expected == ">= 10 (one step)"
    ended = events[-1]
    assert isinstance(ended, RunEnded)
    assert ended.status == "gates failed"


def test_a_smoke_run_is_judged_by_its_own_gates(tmp_path: Path) -> None:
    result = run(RECIPE, RECIPE.smoke, folder=RunFolder(tmp_path / "r"), smoke=True)
    assert result.passed


@pytest.mark.parametrize(
    ("metrics", "value", "passed"),
    [({"a": 2.0}, 2.0, True), ({"a": 1.0}, 1.0, False), ({}, None, False)],
)
def test_gates(metrics: Metrics, value: float | None, passed: bool) -> None:
    (gate,) = judge({"a": Gate(at_least=1.5, baseline="b")}, metrics)
    assert (gate.value, gate.passed) == (value, passed)


def test_what_is_not_a_number_fails_and_can_still_be_written(tmp_path: Path) -> None:
    recipe = made(
        lambda config, context: {"a": math.nan}, gates={"a": Gate(at_most=1.0, baseline="b")}
    )
    result = run(recipe, Config(), folder=RunFolder(tmp_path / "r"))
    assert not result.passed
    text = (tmp_path / "r" / "result.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_a_recipe_without_an_artifact(tmp_path: Path) -> None:
    result = run(made(lambda config, context: {}), Config(), folder=RunFolder(tmp_path / "r"))
    assert result.manifest is None


def test_a_run_that_has_ended_is_not_run_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r")
    first = run(RECIPE, Walk(steps=12), folder=folder)
    before = (folder.path / "metrics.jsonl").read_bytes()
    again = run(RECIPE, Walk(steps=12), folder=folder)
    assert (again.metrics, again.gates, again.manifest) == (
        first.metrics,
        first.gates,
        first.manifest,
    )
    assert (folder.path / "metrics.jsonl").read_bytes() == before


def test_another_run_cannot_have_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r")
    run(RECIPE, Walk(steps=12), folder=folder)
    with pytest.raises(ConfigError, match="holds another run: its steps is 12, not 13"):
        run(RECIPE, Walk(steps=13), folder=folder)
    with pytest.raises(ConfigError, match="its recipe is walk, not toy"):
        run(made(lambda config, context: {}), Config(), folder=folder)


def test_a_run_that_starts_from_another_artifact_is_another_run(tmp_path: Path) -> None:
    def body(config: Config, context: RunContext) -> Metrics:
        (context.artifact / "a.json").write_text("1")
        return {}

    parents = [
        run(RECIPE, Walk(seed=seed), folder=RunFolder(tmp_path / f"{seed}")) for seed in (0, 1)
    ]
    one, other = (parent.folder.path / "artifact" for parent in parents)
    recipe, folder = made(body, inputs=("walk",)), RunFolder(tmp_path / "child")
    run(recipe, Config(), folder=folder, inputs={"walk": one})
    shutil.copytree(one, tmp_path / "moved")
    run(recipe, Config(), folder=folder, inputs={"walk": tmp_path / "moved"})
    with pytest.raises(ConfigError, match="holds another run: its input walk has the content"):
        run(recipe, Config(), folder=folder, inputs={"walk": other})


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    def body(config: Config, context: RunContext) -> Metrics:
        data.record("rows.jsonl", sha256=content[0] * 64, licence="MIT", rows=3)
        context.report({}, step=1, checkpoint=lambda folder: None)
        raise RuntimeError("lost")

    content = ["a"]
    folder = RunFolder(tmp_path / "r")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="lost"):
            run(made(body), Config(), folder=folder)
    content[0] = "b"
    with pytest.raises(ConfigError, match=r"rows\.jsonl has changed since this run began"):
        run(made(body), Config(), folder=folder)
    assert [each["sha256"] for each in data.recorded(folder.path)] == ["a" * 64]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        run(RECIPE, Walk(), folder=RunFolder(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "…"


def test_a_second_driver_is_kept_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r")
    with folder.driven(), pytest.raises(ConfigError, match="being run by another process"):
        run(RECIPE, Walk(), folder=folder)


def test_a_second_writer_waits_and_gives_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with (
        folder.written(),
        pytest.raises(Unavailable, match="still writes"),
        folder.written(patience_s=0.05),
    ):
        pass


def test_a_failed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    whole = run(RECIPE, Walk(steps=18), folder=RunFolder(tmp_path / "whole"))
    events: list[Event] = []
    config = Walk(steps=18)
    folder = RunFolder(tmp_path / "broken")

    def stop_at_13(event: Event) -> None:
        events.append(event)
        if isinstance(event, Reported) and event.step == 13:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run(RECIPE, config, folder=folder, subscribers=[stop_at_13])
    assert isinstance(events[-1], RunEnded)
    assert events[-1].status == "failed"
    assert folder.result() is None
    events.clear()
    again = run(RECIPE, config, folder=folder, subscribers=[events.append])
    assert isinstance(events[0], RunStarted)
    assert events[0].resumed_from == 10
    assert [event.step for event in events if isinstance(event, Reported)] == [*range(11, 19)]
    assert again.metrics == whole.metrics
    assert [(each.step, each.metrics) for each in history.read(folder.path)] == [
        (each.step, each.metrics) for each in history.read(tmp_path / "whole")
    ]
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["earlier_revisions"] == [environment["code_revision"]]


def test_a_run_without_a_checkpoint_begins_with_an_empty_artifact(tmp_path: Path) -> None:
    def body(config: Config, context: RunContext) -> Metrics:
        seen.append([path.name for path in context.artifact.iterdir()])
        (context.artifact / f"{len(seen)}.json").write_text("1")
        if len(seen) == 1:
            raise RuntimeError("stopped")
        return {}

    seen: list[list[str]] = []
    recipe, folder = made(body), RunFolder(tmp_path / "r")
    with pytest.raises(RuntimeError):
        run(recipe, Config(), folder=folder)
    result = run(recipe, Config(), folder=folder)
    assert seen == [[], []]
    assert result.manifest is not None
    assert list(result.manifest.files) == ["2.json"]


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path / "r"), Walk(steps=18, full_at=10)
    with pytest.raises(Unavailable, match="checkpoint of step 10 could not be written"):
        run(RECIPE, config, folder=folder)
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step-0000000005"]
    events: list[Event] = []
    again = run(RECIPE, config, folder=folder, subscribers=[events.append])
    assert isinstance(events[0], RunStarted)
    assert events[0].resumed_from == 5
    whole = run(RECIPE, Walk(steps=18), folder=RunFolder(tmp_path / "whole"))
    assert again.metrics == whole.metrics
    assert [(each.step, each.metrics) for each in history.read(folder.path)] == [
        (each.step, each.metrics) for each in history.read(tmp_path / "whole")
    ]


def test_a_full_disk_while_the_artifact_is_written(tmp_path: Path) -> None:
    def body(config: Config, context: RunContext) -> Metrics:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)
        return {}

    with pytest.raises(Unavailable, match="is full"):
        run(made(body), Config(), folder=RunFolder(tmp_path / "r"))


def test_steps_increase(tmp_path: Path) -> None:
    context = Context(out=tmp_path)
    context.report({}, step=0)
    context.report({}, step=2)
    with pytest.raises(ValueError, match="step is 2, expected more than 2"):
        context.report({}, step=2)


def test_every_worker_saves_and_only_the_first_ones_files_stay(tmp_path: Path) -> None:
    def body(config: Config, context: RunContext) -> Metrics:
        def save(folder: Path) -> None:
            assert list(folder.iterdir()) == []
            (folder / f"{context.workers.rank}").write_text("x")
            saved.append(context.workers.rank)

        context.report({"loss": 1.0}, step=1, checkpoint=save)
        return {}

    saved: list[int] = []
    task = Task(recipe=made(body), config=Config(), out=tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for rank in (0, 1):
        workers = Workers(rank=rank, size=2)
        perform(task, device="cpu", workers=workers, agree=lambda step: -1)
    assert saved == [0, 1]
    files = [path.name for path in tmp_path.glob("checkpoints/*/*")]
    assert sorted(files) == ["0", "checkpoint.json"]
    assert len(history.read(tmp_path)) == 1


def test_data_that_a_run_reads_is_written_down(tmp_path: Path) -> None:
    def body(config: Config, context: RunContext) -> Metrics:
        data.record("one", sha256="a" * 64, licence="MIT", rows=3)
        data.record("two", sha256="b" * 64, licence="CC0-1.0", rows=4000, description="Twos")
        (context.artifact / "a.json").write_text("1")
        return {}

    data.record("outside", sha256="c" * 64, licence="MIT", rows=1)
    result = run(made(body), Config(), folder=RunFolder(tmp_path / "r"))
    names = [each["name"] for each in data.recorded(tmp_path / "r")]
    assert names == ["one", "two"]
    assert result.manifest is not None
    assert result.manifest.data.licence == "CC0-1.0 AND MIT"
    assert result.manifest.data.description == "Twos (4,000 rows)"
    assert len(result.manifest.data.sha256) == 64


def test_inputs_are_parents_and_are_verified(tmp_path: Path) -> None:
    parent = run(RECIPE, Walk(steps=12), folder=RunFolder(tmp_path / "parent"))
    assert parent.manifest is not None
    source = parent.folder.path / "artifact"

    def body(config: Config, context: RunContext) -> Metrics:
        text = (context.inputs["walk"] / "walk.json").read_text()
        (context.artifact / "copy.json").write_text(text)
        return {}

    recipe = made(body, inputs=("walk",))
    child = run(recipe, Config(), folder=RunFolder(tmp_path / "child"), inputs={"walk": source})
    assert child.manifest is not None
    assert child.manifest.parents == (parent.manifest.content_sha256,)
    (source / "walk.json").write_text("changed")
    with pytest.raises(ConfigError, match=r"walk\.json"):
        run(recipe, Config(), folder=RunFolder(tmp_path / "other"), inputs={"walk": source})


def test_ids_sort_by_time_and_are_fit_for_a_folder(tmp_path: Path) -> None:
    folder = RunFolder.fresh(tmp_path, "walk", "my run/../of today")
    assert folder.path.parent == tmp_path / "walk"
    assert folder.id[:8].isdigit()
    assert folder.id[15:-5] == "-my-run-..-of-today"
