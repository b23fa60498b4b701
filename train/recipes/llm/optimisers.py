"""Optimisers by name, what decays, and how the learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from models.errors import ConfigError
from train.recipes.llm.config import OptimiserConfig
from train.recipes.llm.names import find

T = TypeVar("T")
Groups: TypeAlias = list[dict[str, Any]]
Make: TypeAlias = Callable[[Groups, OptimiserConfig], Optimizer]
Schedule: TypeAlias = Callable[[float, OptimiserConfig], float]
"""Share of the way behind us since the warm-up → share of the learning rate."""


class Lion(Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023); a third of AdamW's learning rate
    or less is right for it.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            fast, slow = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, grad = state["momentum"], parameter.grad
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = momentum.mul(fast).add_(grad, alpha=1 - fast).sign_()
                parameter.add_(update, alpha=-group["lr"])
                momentum.lerp_(grad, 1 - slow)
        return None


OPTIMISERS: Mapping[str, Make] = {
    "adamw": lambda groups, c: AdamW(groups, lr=c.learning_rate, betas=c.betas, eps=c.eps),
    "lion": lambda groups, c: Lion(
        groups, lr=c.learning_rate, betas=c.betas, weight_decay=c.weight_decay
    ),
    "sgd": lambda groups, c: SGD(groups, lr=c.learning_rate, momentum=c.momentum),
    "adafactor": lambda groups, c: Adafactor(groups, lr=c.learning_rate),
}


SCHEDULES: Mapping[str, Schedule] = {
    "constant": lambda done, c: 1.0,
    "linear": lambda done, c: _down_to(c.final, 1 - done),
    "cosine": lambda done, c: _down_to(c.final, 0.5 * (1 + math.cos(math.pi * done))),
    "wsd": lambda done, c: _down_to(c.final, min(1.0, (1 - done) / 0.2)),
}


def _down_to(final: float, left: float) -> float:
    return final + (1 - final) * left


def make(model: nn.Module, config: OptimiserConfig) -> Optimizer:
    """Raises ConfigError: no such optimiser."""
    factory = _named(OPTIMISERS, config.name, "training.optimiser.name")
    return factory(grouped(model, config.weight_decay), config)


def schedule(config: OptimiserConfig) -> Schedule:
    """Raises ConfigError: no such schedule."""
    return _named(SCHEDULES, config.schedule, "training.optimiser.schedule")


def _named(known: Mapping[str, T], name: str, key: str) -> T:
    """Ours by its name, or anybody's as ``module:function``."""
    if name in known:
        return known[name]
    if ":" not in name:
        raise ConfigError(
            f"{key} is {name!r}; expected one of {', '.join(known)}, or module:function"
        )
    found: T = find(name, key)
    return found


def grouped(model: nn.Module, weight_decay: float) -> Groups:
    """Trained parameters: matrices, which decay, and the rest, which do not."""
    kept = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and id(parameter) not in kept
            (decayed if decays else rest).append(parameter)
    groups: Groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(config: OptimiserConfig, step: int, total: int) -> float:
    """Of step ``step``, counted from 0."""
    warmup = config.warmup * total if config.warmup < 1 else config.warmup
    if step + 1 < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0) if step > warmup else 0.0
    return config.learning_rate * schedule(config)(done, config)


def set_learning_rate(optimiser: Optimizer, value: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = value
