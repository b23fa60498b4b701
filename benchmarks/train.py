"""Our LoRA loop against the Hugging Face Trainer with PEFT, and Ray Train against the plain loop.

``python -m benchmarks.train``

The Trainer is given the very rows of our steps, in the same order: the same model, adapter,
optimiser, learning rate and dtype, once padded to the longest of a batch (its default) and once
flattened into one row, which is its own way of packing. We pack the rows of a step by
ourselves; that a step has as many rows as the next (``packing: false``) is for the Trainer,
which counts rows. Tokens are real ones, on all sides: padding and repeated ones do not count.
All take turns, and each ratio is of neighbours in time, so that a machine whose speed drifts
does not decide.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.report import Report, table
from train import launch
from train.config import Launch, Resources
from train.context import Context
from train.folder import RunFolder
from train.history import read
from train.recipes.llm import RECIPE, LlmConfig, data
from train.recipes.llm import model as models
from train.recipes.llm.callbacks import Callback, StepEnd
from train.recipes.llm.encoding import Example
from train.recipes.llm.loop import Loop
from train.recipes.llm.packing import Schedule
from train.run import run

WARM = 2
"""Steps before the clock starts."""
RAY_STEPS, RAY_ROWS = 24, 2
"""Of the runs on Ray: many short steps, since each has what a step costs beside computing."""
CPU = torch.device("cpu")
Job = Callable[[], "Outcome"]


@dataclass(frozen=True, slots=True)
class Outcome:
    tokens_per_s: float
    losses: list[float]


class Clock:
    """Tokens per second of the steps after the first few."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._tokens: list[int] = []

    def tick(self, tokens: int) -> None:
        self._ends.append(time.perf_counter())
        self._tokens.append(tokens)

    def tokens_per_s(self) -> float:
        return sum(self._tokens[WARM:]) / (self._ends[-1] - self._ends[WARM - 1])


def settings(text: Path, steps: int, rows: int) -> LlmConfig:
    """LoRA as it is by default, but without dropout, so that all loops have the same losses;
    ``rows`` rows of natural length side by side a step.
    """
    return LlmConfig.model_validate(
        {
            "model": {"lora": {"dropout": 0}},
            "training": {
                "steps": steps,
                "batch_size": rows,
                "micro_batch_size": rows,
                "packing": False,
                "optimiser": {"schedule": "constant", "warmup": 0},
                "checkpoint_every": 10**6,
                "evaluate_every": None,
            },
            "data": {"train": str(text), "evaluation_tokens": 2048},
            "logging": {"every": 1},
        }
    )


def write_rows(folder: Path) -> Path:
    """Paragraphs of the language reference: 20 to 500 words, most of them short."""
    from pydoc_data import topics

    path = folder / "rows.jsonl"
    paragraphs = dict.fromkeys(
        paragraph
        for _, text in sorted(topics.topics.items())
        for paragraph in text.split("\n\n")
        if len(paragraph.split()) >= 20
    )
    import json

    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    return path


@dataclass(frozen=True, slots=True)
class Work:
    """The same rows in the same order for everyone."""

    config: LlmConfig
    prepared: data.Data
    rows: list[Example]

    @classmethod
    def of(cls, config: LlmConfig) -> Work:
        prepared = data.load(config, models.load(config, CPU).tokenizer)
        training = config.training
        schedule = Schedule(
            [data.tokens(unit) for unit in prepared.train],
            limit=training.sequence_length,
            batch=training.batch_size,
            packing=training.packing,
            seed=config.seed,
        )
        rows = [
            prepared.train[i][0]
            for step in range(training.steps)
            for sequence in schedule.step(step)
            for i in sequence
        ]
        return cls(config, prepared, rows)


def run_ours(work: Work) -> Outcome:
    clock, losses = Clock(), list[float]()

    class Watch(Callback):
        def on_step(self, event: StepEnd) -> None:
            clock.tick(event.tokens)
            losses.append(event.loss)

    with tempfile.TemporaryDirectory() as folder:
        loaded = models.load(work.config, CPU)
        loop = Loop(
            work.config,
            Context(out=Path(folder)),
            loaded,
            work.prepared.train,
            work.prepared.held_out[:1],
            [Watch()],
        )
        try:
            loop.run()
        finally:
            loop.close()
    return Outcome(clock.tokens_per_s(), losses)


def run_trainer(work: Work, collate: Callable[[list[Example]], dict[str, torch.Tensor]]) -> Outcome:
    """PEFT's model, the Trainer's loop."""
    clock, training = Clock(), work.config.training
    size, optimiser = training.batch_size, training.optimiser
    batches = [work.rows[i : i + size] for i in range(0, len(work.rows), size)]

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.tick(sum(len(row) for row in batches[state.global_step - 1]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=training.steps,
            per_device_train_batch_size=size,
            learning_rate=optimiser.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=optimiser.weight_decay,
            max_grad_norm=training.clip_norm,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=work.config.seed,
        )
        trainer = Trainer(
            model=models.load(work.config, CPU).network,
            args=arguments,
            train_dataset=_Rows(work.rows),
            data_collator=collate,
            callbacks=[Watch()],
        )
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(clock.tokens_per_s(), losses)


class _Rows(torch.utils.data.Dataset[Example]):
    def __init__(self, rows: Sequence[Example]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._rows[index]


def padded(rows: list[Example]) -> dict[str, torch.Tensor]:
    """Labels are tokens: the model shifts them."""
    longest = max(len(row) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), -100),
    }
    for place, row in enumerate(rows):
        tokens = torch.from_numpy(row.tokens).long()
        batch["input_ids"][place, : len(row)] = tokens
        batch["attention_mask"][place, : len(row)] = 1
        batch["labels"][place, : len(row)] = tokens
    return batch


def flattened(rows: list[Example]) -> dict[str, torch.Tensor]:
    """As ``DataCollatorWithFlattening`` does."""
    tokens = [torch.from_numpy(row.tokens).long() for row in rows]
    labels = [torch.cat([torch.tensor([-100]), row[1:]]) for row in tokens]
    return {
        "input_ids": torch.cat(tokens)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in tokens])[None],
        "labels": torch.cat(labels)[None],
    }


def compare_loops(work: Work, rounds: int) -> tuple[str, str]:
    """A paragraph and a table."""
    jobs: dict[str, Job] = {
        "our loop": lambda: run_ours(work),
        "Trainer, padded": lambda: run_trainer(work, padded),
        "Trainer, flattened": lambda: run_trainer(work, flattened),
    }
    found: dict[str, list[Outcome]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            found[name].append(job())
            print(name, f"{found[name][-1].tokens_per_s:.0f} tokens/s", flush=True)
    ours = found["our loop"]
    rows = []
    for name, outcomes in found.items():
        ratio = statistics.median(
            a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, outcomes, strict=True)
        )
        losses = outcomes[0].losses
        rows.append(
            (
                name,
                statistics.median(outcome.tokens_per_s for outcome in outcomes),
                "" if name == "our loop" else f"{ratio:.2f}",
                "" if name == "our loop" else ">= 1.2",
                f"{losses[0]:.4f}",
                f"{statistics.mean(losses[-5:]):.4f}",
                max(map(abs, map(sub, ours[0].losses, losses))),
            )
        )
    config, lengths = work.config, sorted(len(row) for row in work.rows)
    largest = config.training.batch_size
    longest = [max(map(len, work.rows[i : i + largest])) for i in range(0, len(lengths), largest)]
    share = sum(lengths) / (largest * sum(longest))
    text = (
        f"{config.model.source}, LoRA r {config.model.lora.r} on all linear layers, float32,"
        f" {torch.get_num_threads()} threads; {config.training.steps} steps of {largest} rows"
        f" ({lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]};"
        f" {share:.0%} of a padded batch is real), which our loop packs into one; medians of"
        f" {rounds} rounds in turn, of speeds and of their ratios."
    )
    head = (
        "loop",
        "real tokens/s",
        "ours is",
        "goal",
        "first loss",
        "mean of the last 5",
        "largest difference of any step's loss from ours",
    )
    return text, table(head, rows)


def plain_run(config: LlmConfig, folder: Path, threads: int) -> float:
    """Seconds a step, by the history that every run writes; in a process as fresh as Ray's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_plain_run, (config, folder, threads))


def _plain_run(config: LlmConfig, folder: Path, threads: int) -> float:
    torch.set_num_threads(threads)
    return _seconds(run(RECIPE, config, folder=RunFolder(folder)).folder.path)


def ray_run(config: LlmConfig, folder: Path, threads: int) -> float:
    """The same on a Ray Train group of one worker."""
    import ray

    settings_ = Launch(workers=(1, 1), resources=Resources(cpus=threads))
    try:
        place = launch.place(RECIPE, settings_, workers=(1, 1))
        done = run(RECIPE, config, folder=RunFolder(folder), place=place)
    finally:
        ray.shutdown()
    return _seconds(done.folder.path)


def _seconds(out: Path) -> float:
    times = [report.time for report in read(out)]
    return (times[-2] - times[WARM - 1]) / (len(times) - 1 - WARM)  # the last one evaluates


def compare_ray(text: Path, rounds: int, most_threads: int) -> Iterator[str]:
    """With a core left to Ray's own processes, as clusters have one; and with none."""
    config = settings(text, RAY_STEPS, RAY_ROWS)
    lines = []
    for threads in sorted({max(1, most_threads - 1), most_threads}):
        plain, on_ray = [], []
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as scratch:
                plain.append(plain_run(config, Path(scratch, f"plain{number}"), threads))
                on_ray.append(ray_run(config, Path(scratch, f"ray{number}"), threads))
            print(f"plain {plain[-1]:.3f} s, Ray Train {on_ray[-1]:.3f} s a step", flush=True)
        overhead = statistics.median(b / a - 1 for a, b in zip(plain, on_ray, strict=True))
        goal = "<= 2.5 %" if threads < most_threads else ""
        lines.append(
            (
                f"{threads} of {most_threads}",
                statistics.median(plain),
                statistics.median(on_ray),
                f"{overhead:+.1%}",
                goal,
            )
        )
    head = ("cores for the worker", "plain, s a step", "Ray Train, s a step", "overhead", "goal")
    yield table(head, lines)
    yield (
        f"{RAY_ROWS} rows a step, {RAY_STEPS} steps, medians of {rounds} rounds in turn, of times"
        " and of the ratios of neighbours, each in a fresh process. Ray's own processes (raylet,"
        " GCS, agents, controller) need about a tenth of a core; where the worker has them all,"
        " they take it from the worker."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--no-ray", action="store_true", help="the loops alone")
    which.add_argument("--only-ray", action="store_true", help="what Ray Train costs alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("train", "Fine-tuning: our loop, the Hugging Face Trainer, and Ray Train")
    with tempfile.TemporaryDirectory() as folder:
        text = write_rows(Path(folder))
        if not options.only_ray:
            work = Work.of(settings(text, options.steps, options.rows))
            for part in compare_loops(work, options.rounds):
                report.add(part)
        if not options.no_ray:
            for part in compare_ray(text, options.rounds, options.threads):
                report.add(part)
    report.write()


if __name__ == "__main__":
    main()
