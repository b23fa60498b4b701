"""One objective on several workers: copies of it, or a part of it on each (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from models.errors import ConfigError
from train.recipe import Workers

T = TypeVar("T")
Strategy = Literal["ddp", "fsdp"]


class Group:
    """The workers of a run, and what they do together. A group of one does it alone."""

    def __init__(self, workers: Workers, device: torch.device) -> None:
        self.rank = workers.rank
        self.size = workers.size
        self._device = device
        if self.size > 1 and not distributed.is_initialized():
            raise ConfigError(
                f"this run has {self.size} workers, but torch.distributed is not initialised;"
                " start it with python -m train"
            )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, passes: Sequence[T]) -> list[tuple[T, bool]]:
        """Passes for this worker, and whether each counts.

        Every worker runs as many, since parts of the model may have to meet in each: where they
        cannot be shared evenly, some are run twice and counted once.
        """
        numbers = range(self.rank, -(-len(passes) // self.size) * self.size, self.size)
        return [(passes[n % len(passes)], n < len(passes)) for n in numbers]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of every worker's values; float64."""
        if self.size == 1:
            return dict(values)
        device = self._device if distributed.get_backend() == "nccl" else torch.device("cpu")
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()


def spread(objective: nn.Module, layers: nn.ModuleList, group: Group, how: Strategy) -> nn.Module:
    """The module to train with; ``objective`` itself stays usable, and is one with it."""
    if group.size == 1:
        return objective
    if how == "ddp":
        return DistributedDataParallel(
            objective, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer)
    fully_shard(objective)
    return objective


@contextmanager
def accumulating(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Gradients cross between workers in the last backward pass of a step only."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be in parts; every worker must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This worker's part of ``value``, if ``like`` is in parts."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules: a model's layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())
