"""Where a run is carried out on a cluster. The only file here that knows Ray.

    0 workers          in this process; ``context.map`` as Ray tasks, ``context.actors`` as actors
    1                  one Ray task
    N, or (min, max)   Ray Train: a data-parallel group, replaced whole when one is lost

The first worker writes history and checkpoints itself, into the run's folder, which all
machines must see; the driver follows the history. ``ray.train.report`` is not used: it
holds a worker until the controller's next poll, about two seconds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from models import errors
from models.errors import ConfigError, PlatformError, UpstreamError
from train import history, recipes
from train.config import Launch, Resources
from train.context import kept_here, local_device, serially
from train.recipe import Actors, In, Metrics, Out, Recipe, Workers
from train.run import Emit, Place, Task, perform

_log = logging.getLogger(__name__)

FAILURE = ".failure.json"
"""Why a worker gave up for good; in the run's folder."""

PATIENCE_S = 60.0
"""How long actors whose process was lost are waited for."""

CHUNKS_PER_CPU = 4
"""Of ``map``: enough that a slow chunk does not keep everyone waiting."""


def place(recipe: Recipe[Any], launch: Launch, *, workers: int | tuple[int, int]) -> Place:
    """Where ``launch`` wants ``recipe`` carried out.

    Raises:
        ConfigError: a group for a recipe that cannot use one.
    """
    many = workers if isinstance(workers, int) else workers[1]
    if many > 1 and not recipe.parallel:
        raise ConfigError(
            f"{recipe.name} does not divide its work over data-parallel workers; "
            "--workers 1 runs it on the cluster"
        )

    def carry_out(task: Task, emit: Emit) -> Metrics:
        _connect(group=workers not in (0, 1))
        if workers == 0:
            return perform(task, device=local_device(), fan_out=fan_out, enlist=enlisted, emit=emit)
        (task.out / FAILURE).unlink(missing_ok=True)
        _tell_of_waiting(launch.resources, workers)
        last = task.checkpoints.last()
        with history.followed(task.out, emit, after=last.step if last else -1):
            return _alone(task, launch) if workers == 1 else _group(task, launch, workers)

    return carry_out


def fan_out(function: Callable[[In], Out], items: Sequence[In], /) -> list[Out]:
    """``[function(item) for item in items]`` in Ray tasks; the first error ends all of it."""
    if not items:
        return []
    cpus = max(int(ray.cluster_resources().get("CPU", 1)), 1)
    size = math.ceil(len(items) / (cpus * CHUNKS_PER_CPU))
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    packed = ray.put(_packed(function))
    remote = ray.remote(_apply).options(num_cpus=1)
    tasks = [remote.remote(_environ(), packed, _packed(chunk)) for chunk in chunks]
    try:
        with _own_errors():
            return [output for outputs in ray.get(tasks) for output in outputs]
    except BaseException:
        for each in tasks:
            ray.cancel(each)
        raise


@contextmanager
def enlisted(make: Callable[[In], Any], items: Sequence[In]) -> Iterator[Actors]:
    """``make(item)`` for each item, kept in Ray actors: as many processes as there are CPUs.

    They reserve none. Between two calls they only remember, and one that found no room beside
    what the cluster serves would be waited for for ever.
    """
    cpus = max(int(ray.cluster_resources().get("CPU", 1)), 1)
    count = min(cpus, len(items))
    keeper = ray.remote(_Keeper).options(num_cpus=0, max_restarts=-1, scheduling_strategy="SPREAD")
    shares = [{n: items[n] for n in range(first, len(items), count)} for first in range(count)]
    keepers = [keeper.remote(_environ(), _packed((make, share))) for share in shares]
    try:
        yield _Enlisted(keepers)
    finally:
        for each in keepers:
            ray.kill(each)


class _Enlisted:
    """The keepers' side that callers see: object ``n`` is with keeper ``n % count``."""

    def __init__(self, keepers: Sequence[Any]) -> None:
        self._keepers = keepers

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """See :class:`train.recipe.Actors`."""
        shares: dict[int, dict[int, tuple[Any, ...]]] = {}
        for number, given in arguments.items():
            shares.setdefault(number % len(self._keepers), {})[number] = given
        calls = [
            (self._keepers[keeper], self._keepers[keeper].call.remote(method, _packed(share)))
            for keeper, share in shares.items()
        ]
        answers: dict[int, Any] = {}
        for keeper, call in calls:
            try:
                answers |= ray.get(call)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:
                    raise
                _log.warning("a process with actors was lost, and begins anew: %s", error)
                _wait_for(keeper)
            except ray.exceptions.RayError as error:
                raise _own(error) from error
        return answers


def _wait_for(keeper: Any) -> None:
    """Until Ray has started it again: else whoever goes on without it would do so in no time."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            ray.get(keeper.call.remote("", _packed({})), timeout=PATIENCE_S)
            return
        except ray.exceptions.RayActorError:
            time.sleep(0.2)
        except ray.exceptions.GetTimeoutError:
            return


def _connect(*, group: bool) -> None:
    """To the cluster of ``RAY_ADDRESS``, or to a Ray of our own on this machine."""
    if not ray.is_initialized():
        # Ray Train asks the dashboard's state API, and complains each second where there is none.
        own = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": group}
        ray.init(logging_level=logging.WARNING, **own)


def _tell_of_waiting(wanted: Resources, workers: int | tuple[int, int]) -> None:
    """Ray waits without a word, for as long as it takes."""
    least = workers if isinstance(workers, int) else workers[0]
    shortage = lacking(wanted, least, ray.available_resources(), ray.cluster_resources())
    if shortage:
        _log.warning(
            "the cluster has no room yet: %s. What it serves may hold them (`ray status`); the run"
            " begins as soon as it can. --workers 0 runs it in this process instead.",
            shortage,
        )


def lacking(
    wanted: Resources, workers: int, free: Mapping[str, float], whole: Mapping[str, float]
) -> str:
    """``2 CPU wanted, 0 of 2 free``; empty if there is enough.

    Args:
        wanted: of each worker.
        free, whole: of the cluster, by Ray's names.
    """
    needs = {"CPU": wanted.cpus * workers, "GPU": wanted.gpus * workers}
    return ", ".join(
        f"{need:g} {name} wanted, {free.get(name, 0):g} of {whole.get(name, 0):g} free"
        for name, need in needs.items()
        if need > free.get(name, 0)
    )


def _alone(task: Task, launch: Launch) -> Metrics:
    remote = ray.remote(_perform_alone).options(
        num_cpus=launch.resources.cpus,
        num_gpus=launch.resources.gpus,
        max_retries=launch.retries,
        name=f"train {task.recipe.name}",
    )
    with _own_errors():
        metrics: Metrics = ray.get(remote.remote(_environ(), _packed(task)))
        return metrics


def _group(task: Task, launch: Launch, workers: int | tuple[int, int]) -> Metrics:
    from ray.train import (
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchTrainer

    scratch = task.out / ".ray"
    resources = {"CPU": launch.resources.cpus}
    if launch.resources.gpus:
        resources["GPU"] = launch.resources.gpus
    trainer = TorchTrainer(
        _perform_in_group,
        train_loop_config={"environ": _environ(), "task": _packed(task)},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=launch.resources.gpus > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=launch.resize_every_s,
        ),
        run_config=RunConfig(
            name=task.out.name,
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=launch.retries),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    shutil.rmtree(scratch, ignore_errors=True)  # or Ray would go on with a state of its own
    try:
        metrics: Metrics | None = trainer.fit().return_value
    except TrainingFailedError as error:
        _raise_failure(task.out)
        raise _own(error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _raise_failure(task.out)
    if metrics is None:
        raise UpstreamError("Ray Train ended without a result; its log says why")
    return metrics


# In the workers. They get their task packed, and only open it when they find recipes where
# the driver does.


def _adopt(environ: Mapping[str, str]) -> None:
    os.environ.update(environ)
    for folder in recipes.elsewhere(environ):
        if folder not in recipes.__path__:
            recipes.__path__.append(folder)


def _apply(environ: Mapping[str, str], function: bytes, items: bytes) -> list[Any]:
    _adopt(environ)
    call = _unpacked(function)
    return [call(item) for item in _unpacked(items)]


class _Keeper:
    """Of some of the objects that a run has enlisted."""

    def __init__(self, environ: Mapping[str, str], packed: bytes) -> None:
        _adopt(environ)
        make, items = _unpacked(packed)
        self._objects = {number: make(item) for number, item in items.items()}

    def call(self, method: str, packed: bytes) -> dict[int, Any]:
        arguments = _unpacked(packed)
        return {n: getattr(self._objects[n], method)(*given) for n, given in arguments.items()}


def _perform_alone(environ: Mapping[str, str], packed: bytes) -> Metrics:
    _adopt(environ)
    task: Task = _unpacked(packed)
    _see_folder(task.out)
    return perform(task, device=local_device(), fan_out=fan_out, enlist=enlisted)


def _perform_in_group(config: Mapping[str, Any]) -> Metrics | None:
    """One member of the group; what the first one returns is the result.

    An error that would come again is not raised: Ray would start the group anew. It is
    written down for the driver, and the others leave when they miss this one.
    """
    import torch.distributed as dist

    _adopt(config["environ"])
    task: Task = _unpacked(config["task"])
    here = ray.train.get_context()
    workers = Workers(rank=here.get_world_rank(), size=here.get_world_size())
    failure = task.out / FAILURE
    try:
        _see_folder(task.out)
        return perform(
            task,
            device=_group_device(),
            workers=workers,
            fan_out=serially if workers.size > 1 else fan_out,
            enlist=kept_here if workers.size > 1 else enlisted,
            agree=_agree if workers.size > 1 else lambda step: step,
        )
    except PlatformError as error:
        _write_failure(failure, error)
        if dist.is_initialized():
            dist.destroy_process_group()
        return None
    except Exception:
        if failure.exists():
            return None
        raise


def _group_device() -> str:
    return str(ray.train.torch.get_device()) if local_device() != "cpu" else "cpu"


def _agree(step: int) -> int:
    """The first worker's number, in every worker."""
    import torch
    import torch.distributed as dist

    device = ray.train.torch.get_device() if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor([step], dtype=torch.int64, device=device)
    dist.broadcast(shared, src=0)
    return int(shared.item())


def _see_folder(out: Path) -> None:
    if not (out / "config.yaml").is_file():
        raise ConfigError(
            f"a worker does not see the run's folder {out}; "
            "set FRONTIER_RUNS to a folder that all machines of the cluster share"
        )


def _write_failure(path: Path, error: PlatformError) -> None:
    told = {"type": type(error).__name__, "message": error.message}
    if path.parent.is_dir():
        path.write_text(json.dumps(told))


def _raise_failure(out: Path) -> None:
    try:
        told = json.loads((out / FAILURE).read_text())
    except FileNotFoundError:
        return
    kind: type[PlatformError] = getattr(errors, told["type"], errors.InternalError)
    raise kind(told["message"])


# What crosses, and what comes back.


def _environ() -> dict[str, str]:
    """What a worker needs to be told of ours. It has another working directory."""
    told = {name: text for name, text in os.environ.items() if name.startswith("FRONTIER_")}
    if recipes.VARIABLE in told:
        told[recipes.VARIABLE] = os.pathsep.join(recipes.__path__[1:])
    return told


def _packed(value: Any) -> bytes:
    packed: bytes = ray.cloudpickle.dumps(value)
    return packed


def _unpacked(packed: bytes) -> Any:
    return ray.cloudpickle.loads(packed)


@contextmanager
def _own_errors() -> Any:
    """Errors as the recipe raised them, not as Ray wraps them."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise _own(error) from error


def _own(error: BaseException) -> BaseException:
    """What went wrong in a worker: the recipe's own error if there is one."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    if failures := getattr(error, "worker_failures", None):
        return UpstreamError(
            f"the workers failed too often; worker {min(failures)}: {failures[min(failures)]}\n"
            "Run again with --resume to go on from the last checkpoint."
        )
    return UpstreamError(
        f"a worker was lost too often ({type(error).__name__}: {error}). "
        "Run again with --resume to go on from the last checkpoint."
    )
