"""All that a run needs to go on: trained weights, optimiser, where it stands, its best.

Nothing depends on the number of workers, and nothing is pickled. There is no random state:
each forward pass is seeded by step and place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from train.recipes.llm.parallel import part_like, whole

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True, kw_only=True)
class State:
    """Where a run stands, between two steps."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Seen so far, of all workers."""
    train_loss: float = float("nan")
    """Mean over the last report's steps."""
    base: dict[str, float] = field(default_factory=dict)
    """The evaluation before the first step."""
    best: dict[str, float] = field(default_factory=dict)
    """The evaluation with the lowest loss."""
    best_step: int = 0
    stale: int = 0
    """Evaluations since the best one."""
    stopped: bool = False
    """Early."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """Loss scaling, of fp16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state with its tensors."""

    state: State
    weights: Tensors
    optimiser: Tensors
    best: Tensors
    """Weights of the best evaluation."""

    def save(self, folder: Path) -> None:
        _save(folder / "weights.safetensors", self.weights)
        _save(folder / "optimiser.safetensors", self.optimiser)
        if self.state.best_step != self.state.step:
            _save(folder / "best.safetensors", self.best)
        (folder / "state.json").write_text(json.dumps(asdict(self.state)) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Snapshot:
        state = State(**json.loads((folder / "state.json").read_text()))
        weights = load_file(folder / "weights.safetensors")
        best = folder / "best.safetensors"
        return cls(
            state=state,
            weights=weights,
            optimiser=load_file(folder / "optimiser.safetensors"),
            best=load_file(best) if state.best_step != state.step else weights,
        )


def _save(path: Path, tensors: Tensors) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def weights_of(trained: Mapping[str, nn.Parameter]) -> Tensors:
    """The very tensors, or whole copies where they are in parts."""
    return {name: whole(parameter.detach()) for name, parameter in trained.items()}


def copied(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def put_weights(trained: Mapping[str, nn.Parameter], weights: Tensors) -> None:
    for name, parameter in trained.items():
        parameter.copy_(part_like(weights[name], parameter))


def optimiser_tensors(optimiser: Optimizer, trained: Mapping[str, nn.Parameter]) -> Tensors:
    """``name/key`` → tensor."""
    tensors: Tensors = {}
    for name, parameter in trained.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = whole(torch.as_tensor(value))
    return tensors


def put_optimiser(
    optimiser: Optimizer, trained: Mapping[str, nn.Parameter], tensors: Tensors
) -> None:
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = trained[name]
        scalar = value.dim() == 0  # a count of steps, which lives on the CPU
        optimiser.state[parameter][key] = value if scalar else part_like(value, parameter.detach())
