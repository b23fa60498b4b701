"""``python -m train NAME``: run a recipe, judge it by its gates, seal what it made.

    python -m train --list
    python -m train vision --set epochs=3
    python -m train llm --config experiment.yaml --workers 2 --register my-chat
    python -m train --resume RUN_DIR

Exit codes: 0 every gate passed · 1 a gate failed · 2 something that was given is wrong ·
3 the run failed, and can be resumed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from models import artifact
from models.errors import ConfigError, InvalidInput, PlatformError
from models.versions import check_name
from state.places import Places
from train import config as configuration
from train.checkpoints import Best
from train.config import Launch
from train.discover import discover, find
from train.folder import RunFolder
from train.recipe import Config, Recipe
from train.run import Place, Result

PASSED, GATES_FAILED, BAD_INPUT, FAILED, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the command line, the file and an earlier run together ask for."""

    recipe: Recipe[Any]
    config: Config
    launch: Launch
    inputs: dict[str, str]
    bases: dict[str, str]
    """Where an earlier attempt had them."""
    folder: RunFolder
    smoke: bool
    register: str | None

    @property
    def workers(self) -> int | tuple[int, int]:
        if self.launch.workers is not None:
            return self.launch.workers
        return 1 if os.environ.get("RAY_ADDRESS") else 0

    @property
    def fan_out(self) -> bool:
        if self.launch.fan_out is not None:
            return self.launch.fan_out
        return bool(os.environ.get("RAY_ADDRESS"))

    @property
    def best(self) -> Best | None:
        wanted = self.launch.checkpoints
        return Best(metric=wanted.best, mode=wanted.mode) if wanted.best else None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("name", nargs="?", metavar="NAME", help="which recipe; see --list")
    top.add_argument("--list", action="store_true", help="all recipes")
    top.add_argument(
        "--show", metavar="NAME", help="what may be set, what must be reached, what it predicts"
    )
    top.add_argument("--config", type=Path, metavar="FILE", help="an experiment as YAML")
    top.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one key of the recipe's configuration; may be given again",
    )
    top.add_argument("--smoke", action="store_true", help="the recipe's own few seconds")
    top.add_argument("--out", type=Path, metavar="DIR", help="the run's folder; default: a new one")
    top.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with that run")
    top.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="KIND=REF_OR_PATH",
        help="an artifact to start from: a run, a folder, or NAME@ALIAS of the registry",
    )
    top.add_argument(
        "--workers",
        metavar="N",
        help="0: this process; 1: a worker of the cluster; more, or MIN-MAX: a group",
    )
    top.add_argument("--run-name", metavar="TEXT", help="part of the run's id")
    top.add_argument(
        "--register",
        nargs="?",
        const="",
        metavar="NAME",
        help="put the artifact into the registry if its gates pass; default: the recipe's name",
    )
    return top


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        if arguments.register:
            check_name(arguments.register)
        with _terminated_as_interrupted():
            if arguments.list:
                return _list()
            if arguments.show is not None:
                return _show(find(arguments.show))
            return _train(plan(arguments))
    except PlatformError as error:
        _say(f"error: {error.message}")
        return BAD_INPUT if isinstance(error, ConfigError | InvalidInput) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def plan(arguments: argparse.Namespace) -> Plan:
    """Raises ConfigError: whatever was given is wrong or does not fit together."""
    if arguments.resume is not None:
        return _resumed(arguments)
    tree = configuration.read(arguments.config) if arguments.config else {}
    name = arguments.name or tree.get("recipe")
    if name is None:
        raise ConfigError(f"which recipe? Known: {', '.join(discover().recipes)}")
    recipe = find(str(name))
    experiment = configuration.experiment(tree, recipe.config, called=str(arguments.config))
    if experiment.recipe not in (None, name):
        raise ConfigError(f"{arguments.config} is for {experiment.recipe}, not for {name}")
    base = recipe.smoke.model_dump(exclude_unset=True) if arguments.smoke else {}
    run_name = arguments.run_name or experiment.run_name or ("smoke" if arguments.smoke else None)
    return Plan(
        recipe=recipe,
        config=_pinned(
            recipe,
            _config(recipe, configuration.merged(base, experiment.config), arguments.set),
        ),
        launch=_launch(experiment.launch(), arguments),
        inputs={**experiment.inputs, **_inputs(arguments.input)},
        bases={},
        folder=(
            RunFolder(arguments.out.absolute())
            if arguments.out
            else RunFolder.fresh(Places.of().runs, recipe.name, run_name)
        ),
        smoke=arguments.smoke,
        register=arguments.register,
    )


def _resumed(arguments: argparse.Namespace) -> Plan:
    """The run as it was asked for; only where it runs may differ."""
    folder = RunFolder(arguments.resume.absolute())
    request = folder.request()
    if request is None:
        raise ConfigError(f"--resume {arguments.resume}: there is no run in this folder")
    fixed = {"--config": arguments.config, "--set": arguments.set, "--out": arguments.out,
             "--input": arguments.input, "--smoke": arguments.smoke}  # fmt: skip
    for flag, given in fixed.items():
        if given:
            raise ConfigError(f"{flag} cannot be changed with --resume; begin a new run")
    if arguments.name not in (None, request.recipe):
        raise ConfigError(f"{folder.path} is a run of {request.recipe}, not of {arguments.name}")
    recipe = find(request.recipe)
    launch = configuration.validated(Launch, request.launch, called=str(folder.path))
    return Plan(
        recipe=recipe,
        config=_config(recipe, request.config, ()),
        launch=_launch(launch, arguments),
        inputs={k: path for k, path in request.inputs.items() if k not in recipe.bases},
        bases={k: path for k, path in request.inputs.items() if k in recipe.bases},
        folder=folder,
        smoke=request.smoke,
        register=arguments.register,
    )


def _config(recipe: Recipe[Any], tree: Any, settings: Sequence[str]) -> Config:
    tree = configuration.with_settings(tree, settings)
    config: Config = configuration.validated(recipe.config, tree, called=recipe.name)
    return config


def _pinned(recipe: Recipe[Any], config: Config) -> Config:
    from train import inputs

    settings = inputs.pins(recipe, config, _version)
    return _config(recipe, config.model_dump(mode="json"), settings) if settings else config


def _launch(launch: Launch, arguments: argparse.Namespace) -> Launch:
    if arguments.workers is None:
        return launch
    try:
        numbers = [int(part) for part in arguments.workers.split("-")]
        workers: Any = numbers[0] if len(numbers) == 1 else tuple(numbers)
    except ValueError:
        workers = arguments.workers
    tree = {**launch.model_dump(), "workers": workers}
    return configuration.validated(Launch, tree, called="--workers")


def _inputs(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        kind, equals, reference = text.partition("=")
        if not (kind and equals and reference):
            raise ConfigError(f"--input {text}: expected KIND=RUN_DIR or KIND=NAME@ALIAS")
        found[kind] = reference
    return found


def _train(plan: Plan) -> int:
    try:
        return _run(plan)
    except KeyboardInterrupt:
        _say("interrupted")
        _advise(plan)
        return INTERRUPTED
    except (ConfigError, InvalidInput):
        raise
    except PlatformError as error:
        _say(f"error: {error.message}")
        _advise(plan)
        return FAILED
    except Exception:
        traceback.print_exc()
        _advise(plan)
        return FAILED


def _advise(plan: Plan) -> None:
    if plan.folder.request() is not None:
        _say(f"go on with: python -m train --resume {plan.folder.path}")


def _run(plan: Plan) -> int:
    from train import inputs, progress
    from train.run import run

    folders = {
        **inputs.resolve(plan.recipe, plan.inputs, _from_registry),
        **inputs.bases(plan.recipe, plan.config, plan.bases, _from_registry),
    }
    with _needed(plan, folders):
        result = run(
            plan.recipe,
            plan.config,
            folder=plan.folder,
            smoke=plan.smoke,
            inputs=folders,
            launch=plan.launch.model_dump(mode="json"),
            keep=plan.launch.checkpoints.last,
            best=plan.best,
            place=_place(plan),
            subscribers=[progress.subscriber(), *_keepers(plan)],
        )
    _tell(result)
    if not result.passed:
        if plan.register is not None:
            _say("not registered: a gate failed")
        return GATES_FAILED
    if plan.register is not None:
        _register(result, plan.register or None)
    return PASSED


def _place(plan: Plan) -> Place | None:
    """``None``: in this process, without Ray."""
    if plan.workers == 0 and not plan.fan_out:
        return None
    from train import launch

    return launch.place(plan.recipe, plan.launch, workers=plan.workers)


def _keepers(plan: Plan) -> Iterator[Any]:
    from train import tracking
    from train.plots import Plots

    yield from tracking.subscribers(plan.launch.tracking, _say)
    if plan.launch.plots:
        yield tracking.Forgiving(Plots(), _say)


@contextmanager
def _needed(plan: Plan, folders: Mapping[str, Path]) -> Iterator[None]:
    """Nobody collects the inputs until the run has ended; one that failed may go on."""
    if not folders:
        yield
        return
    from train import registered  # brings the database

    hashes = {kind: artifact.read(path).content_sha256 for kind, path in folders.items()}
    with registered.held(hashes, by=plan.folder.id, warn=_say):
        yield
    registered.release(hashes, by=plan.folder.id, warn=_say)


def _tell(result: Result) -> None:
    for name, value in result.metrics.items():
        print(f"{name:<32} {value:.6g}")
    for gate in result.gates:
        mark = "passed" if gate.passed else "FAILED"
        reached = "nothing" if gate.value is None else f"{gate.value:.6g}"
        print(f"gate {mark}: {gate.metric} {reached}, expected {gate.expected}")
    made = "no artifact" if result.manifest is None else f"artifact {result.folder.path}/artifact"
    print(f"{made}  ({result.seconds:.1f} s)", flush=True)


def _list() -> int:
    found = discover()
    width = max(map(len, found.recipes), default=0)
    for name, recipe in found.recipes.items():
        print(f"{name:<{width}}  {recipe.summary}")
    for module, why in found.broken.items():
        _say(f"{module} cannot be used: {why}")
    return PASSED


def _show(recipe: Recipe[Any]) -> int:
    print(f"{recipe.name}: {recipe.summary}")
    print(f"makes: {recipe.kind} ({recipe.licence or 'under the licence of what it starts from'})")
    if recipe.inputs:
        print(f"needs: {', '.join(f'--input {kind}=…' for kind in recipe.inputs)}")
    if recipe.data:
        print(f"data: {recipe.data}")
    print("\nconfiguration:")
    rows = list(configuration.keys(recipe.config, _defaults(recipe)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row[:3], widths, strict=True)]
        print(f"  {'  '.join(cells)}  {row.doc}".rstrip())
    print("\ngates:")
    for name, gate in recipe.gates.items():
        print(f"  {name} {gate}")
    if recipe.space:
        print("\nsweep (python -m tune):")
        for key, domain in recipe.space.items():
            print(f"  {key}: {domain}")
    if recipe.sample:
        print(f"\nan input it predicts for: {recipe.sample[0]!r:.200}")
    return PASSED


def _defaults(recipe: Recipe[Any]) -> dict[str, Any]:
    """Of every key that has one."""
    try:
        defaults: dict[str, Any] = recipe.config().model_dump(mode="json")
    except ValueError:  # it has keys without a default
        fields = recipe.config.model_fields.items()
        return {name: field.get_default() for name, field in fields if not field.is_required()}
    return defaults


def _from_registry(reference: str) -> Path:
    from train import registered  # brings the database

    return registered.fetch(reference)


def _version(reference: str) -> str:
    from train import registered

    return registered.version(reference)


def _register(result: Result, name: str | None) -> None:
    from train import registered

    if result.manifest is None:
        raise ConfigError("there is nothing to register: the recipe makes no artifact")
    folder = result.folder
    by = f"train {folder.id}"
    version = registered.register(folder.path / "artifact", result.manifest, by=by, name=name)
    print(f"registered {version}", flush=True)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which ``ray job stop`` sends, ends a run in order, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
