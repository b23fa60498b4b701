"""The loop: batch → gradients → step → evaluate → report, with all its state in sight.

    Schedule.step(n) ─ groups ─► this worker's share ─► Row ─► Objective ─► backward
                                                               last one: gradients cross
    clip ─ optimiser ─ learning rate(n) ─► callbacks ─► evaluate? ─► report, checkpoint?

What a step computes depends on configuration and step number alone: batches are a function
of the number, each forward pass is seeded by step and place, and losses are summed and
divided once by the whole batch's weight. So workers, restarts and micro-batches change
nothing but the order of additions.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.errors import ConfigError
from train.recipe import Metrics, RunContext
from train.recipes.llm import checkpoint, optimisers
from train.recipes.llm import objective as objectives
from train.recipes.llm.callbacks import Callback, EpochEnd, EvalEnd, StepEnd
from train.recipes.llm.checkpoint import Snapshot, State, Tensors
from train.recipes.llm.config import LlmConfig
from train.recipes.llm.data import tokens
from train.recipes.llm.encoding import Unit
from train.recipes.llm.evaluation import evaluate, named
from train.recipes.llm.model import Model
from train.recipes.llm.objective import Row
from train.recipes.llm.packing import Schedule, groups
from train.recipes.llm.parallel import Group, accumulating, layers_of, spread, whole

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Loop:
    """One run on one worker.

    Args:
        model: with the weights to start from; the same on every worker.
        train: what to learn from.
        held_out: what decides which weights are the best.
    """

    def __init__(
        self,
        config: LlmConfig,
        context: RunContext,
        model: Model,
        train: Sequence[Unit],
        held_out: Sequence[Unit],
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.model = model
        self.state = State()
        self.best: Tensors = {}
        self._context = context
        self._settings = config.training
        self._train, self._held_out = train, held_out
        self._callbacks = callbacks
        self._device = torch.device(context.device)
        self._group = Group(context.workers, self._device)
        self._schedule = Schedule(
            [tokens(unit) for unit in train],
            limit=self._settings.sequence_length,
            batch=self._settings.batch_size,
            packing=self._settings.packing,
            seed=config.seed,
        )
        epochs = self._settings.epochs
        self.total = self._schedule.steps_of(epochs) if epochs else self._settings.steps
        self.objective = objectives.make(config, model)
        self.objective.attach(self._device, freeze=self._freezes)
        layers = layers_of(model.causal_lm)
        if config.model.compile:
            for layer in layers:
                layer.compile(dynamic=True)
        self._module = spread(self.objective, layers, self._group, self._settings.parallel)
        self._trained = model.trained()
        self._optimiser = optimisers.make(model.network, self._settings.optimiser)
        optimisers.schedule(self._settings.optimiser)  # an unknown one is told of before any work
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=model.dtype == torch.float16)
        self._since = _Since()

    def run(self) -> Metrics:
        """Train to the end, from the context's checkpoint if there is one.

        Raises:
            ConfigError: the loss is no longer a number.
        """
        self.objective.train()
        if self._context.checkpoint is not None:
            self._restore(Snapshot.load(self._context.checkpoint))
        else:
            self._evaluate()
        self._since = _Since()
        while self.state.step < self.total and not self.state.stopped:
            self._train_one_step()
            self._report_if_due()
        return self._results()

    def close(self) -> None:
        self.objective.close()

    @property
    def _freezes(self) -> bool:
        """Whether layers may be packed: not if they shall be compiled or divided."""
        divided = self._group.size > 1 and self._settings.parallel == "fsdp"
        plain = self.config.model.adapter == "lora" and self.model.dtype == torch.float32
        return plain and not divided and not self.config.model.compile

    # One step

    def _train_one_step(self) -> None:
        state, settings = self.state, self._settings
        number = state.step
        rate = optimisers.learning_rate(settings.optimiser, number, self.total)
        optimisers.set_learning_rate(self._optimiser, rate)
        batch = self._schedule.step(number)
        units = [self._train[i] for sequence in batch for i in sequence]
        sums = self._backward(number, groups(batch, settings.micro_batch_size), units)
        norm = self._update()
        weight = self.objective.weigh(units)
        loss = sums["loss"] / weight
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss} in step {number + 1} of {self.total}; a lower"
                f" training.optimiser.learning_rate (now {rate:.2g}) or fp32 may help"
            )
        count = sum(tokens(unit) for unit in units)
        state.step += 1
        state.tokens += count
        self._since.add(loss, weight, count, norm)
        self._tell(
            StepEnd(
                step=state.step,
                total=self.total,
                loss=loss,
                grad_norm=norm,
                learning_rate=rate,
                tokens=count,
            )
        )
        epochs = self._schedule.epochs_before(state.step)
        for epoch in range(self._schedule.epochs_before(number), epochs):
            self._tell(EpochEnd(epoch=epoch + 1, step=state.step))

    def _backward(
        self, number: int, passes: list[list[tuple[int, ...]]], units: Sequence[Unit]
    ) -> dict[str, float]:
        """Gradients of the mean over ``units``; sums over them, of all workers."""
        # Wrappers average over workers, so each contributes its sum times their number.
        scale = self._group.size / self.objective.weigh(units)
        share = self._group.share(list(enumerate(passes)))
        sums: dict[str, float] = {}
        for place, ((index, sequences), counts) in enumerate(share):
            torch.manual_seed(_seed(self.config.seed, number, index))
            row = Row.of([self._train[i] for packed in sequences for i in packed], self._device)
            with accumulating(self._module, last=place == len(share) - 1):
                with self._numerics():
                    result: Mapping[str, torch.Tensor] = self._module(row)
                    loss = result["loss"] * (scale if counts else 0.0)
                self._scaler.scale(loss).backward()
            for name, value in result.items():
                sums[name] = sums.get(name, 0.0) + (float(value.detach()) if counts else 0.0)
        return self._group.sum(sums)

    def _update(self) -> float:
        """One step of the optimiser; the norm of the gradients before clipping."""
        self._scaler.unscale_(self._optimiser)
        limit = self._settings.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self._trained.values(), limit)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._optimiser.zero_grad(set_to_none=True)
        return float(whole(norm))

    @contextmanager
    def _numerics(self) -> Iterator[None]:
        """Precision and attention kernel of a forward pass."""
        kernel = KERNELS.get(self.config.model.sdpa)
        with self.model.autocast(self._device):
            if kernel is None:
                yield
            else:
                with sdpa_kernel(kernel):
                    yield

    # Between steps

    def _report_if_due(self) -> None:
        state, settings = self.state, self._settings
        last = state.step == self.total
        evaluates = last or _due(state.step, settings.evaluate_every)
        if evaluates:
            self._since.pause()
            self._evaluate()
        last = last or state.stopped
        saves = last or _due(state.step, settings.checkpoint_every)
        if not (evaluates or saves or _due(state.step, self.config.logging.every)):
            return
        metrics = self._since.metrics()
        state.train_loss = metrics["loss"]
        metrics["learning_rate"] = self._optimiser.param_groups[0]["lr"]
        metrics["epoch"] = float(self._schedule.epochs_before(state.step))
        if evaluates:
            metrics |= self._eval_metrics()
        self._context.report(
            metrics, step=state.step, total=self.total, checkpoint=self._save if saves else None
        )
        self._since = _Since()

    def _evaluate(self) -> None:
        state = self.state
        with self._numerics():
            self._last = evaluate(
                self.objective,
                self._held_out,
                limit=self._settings.sequence_length,
                micro=self._settings.micro_batch_size,
                group=self._group,
                device=self._device,
            )
        if not state.step:
            state.base = self._last
        better = not state.best or (
            self._last["loss"] < state.best["loss"] - self._settings.min_improvement
        )
        if better:
            state.best, state.best_step, state.stale = self._last, state.step, 0
            weights = checkpoint.weights_of(self._trained)
            self.best = checkpoint.copied(weights) if self._group.first else {}
        else:
            state.stale += 1
            state.stopped = bool(self._settings.patience) and (
                state.stale >= (self._settings.patience or 0)
            )
        self._tell(EvalEnd(step=state.step, metrics=self._eval_metrics(), best=better))

    def _eval_metrics(self) -> dict[str, float]:
        return named(self._last, self.state.base, of_tokens=self._of_tokens)

    @property
    def _of_tokens(self) -> bool:
        return self.objective.unit == "tokens"

    def _tell(self, event: StepEnd | EpochEnd | EvalEnd) -> None:
        for callback in self._callbacks:
            match event:
                case StepEnd():
                    callback.on_step(event)
                case EpochEnd():
                    callback.on_epoch_end(event)
                case EvalEnd():
                    callback.on_eval_end(event)

    def _save(self, folder: Path) -> None:
        """On every worker, since parts must meet; the first one writes."""
        self.state.scaler = self._scaler.state_dict()
        snapshot = Snapshot(
            state=self.state,
            weights=checkpoint.weights_of(self._trained),
            optimiser=checkpoint.optimiser_tensors(self._optimiser, self._trained),
            best=self.best,
        )
        if self._group.first:
            snapshot.save(folder)

    def _restore(self, snapshot: Snapshot) -> None:
        self.state = snapshot.state
        self.best = snapshot.best if self._group.first else {}
        checkpoint.put_weights(self._trained, snapshot.weights)
        checkpoint.put_optimiser(self._optimiser, self._trained, snapshot.optimiser)
        if snapshot.state.scaler:
            self._scaler.load_state_dict(snapshot.state.scaler)

    def _results(self) -> Metrics:
        """Of the best weights, beside the ones before the first step."""
        state = self.state
        return {
            **named(state.best, state.base, of_tokens=self._of_tokens),
            "train_loss": state.train_loss,
            "steps": float(state.step),
            "best_step": float(state.best_step),
            "tokens": float(state.tokens),
        }


class _Since:
    """What has gathered since the last report."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._weight = 0
        self._tokens = 0
        self._norm = 0.0
        self._began = time.perf_counter()
        self._seconds: float | None = None

    def add(self, loss: float, weight: int, count: int, norm: float) -> None:
        self._loss += loss * weight
        self._weight += weight
        self._tokens += count
        self._norm = norm

    def pause(self) -> None:
        """The clock stops: what follows is not training."""
        self._seconds = time.perf_counter() - self._began

    def metrics(self) -> dict[str, float]:
        seconds = self._seconds or time.perf_counter() - self._began
        return {
            "loss": self._loss / self._weight,
            "grad_norm": self._norm,
            "tokens_per_s": self._tokens / seconds,
        }


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed(seed: int, step: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
