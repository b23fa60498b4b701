"""``python -m tune NAME``: search for the best configuration of a recipe.

    python -m tune --list
    python -m tune vision --trials 30 --scheduler asha
    python -m tune --config tune/sweeps/hyperparameters-asha.yaml
    python -m tune vision --config sweep.yaml --set epochs=8 --space 'lr={low: 1e-4, high: 1}'
    python -m tune --resume SWEEP_DIR --trials 60
    python -m tune --show SWEEP_DIR

Exit codes: 0 a best configuration was found · 1 no trial had a result · 2 something that was
given is wrong · 3 the sweep failed, and can be resumed · 130 it was interrupted, likewise.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.errors import ConfigError, InvalidInput, PlatformError
from state.places import Places
from train.config import validated, with_settings
from train.discover import discover, find
from train.folder import RunFolder
from train.recipe import Recipe
from tune import config as configuration
from tune import space as spaces
from tune.config import Sweep

FOUND, NOTHING, BAD_INPUT, FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("name", nargs="?", metavar="NAME", help="which recipe; see --list")
    top.add_argument("--list", action="store_true", help="all recipes, and what they vary")
    top.add_argument(
        "--show", metavar="WHAT", help="what a recipe varies, or what a sweep's folder has found"
    )
    top.add_argument("--config", type=Path, metavar="FILE", help="a sweep as YAML")
    again: dict[str, Any] = {"action": "append", "default": [], "type": str}
    top.add_argument(
        "--set", metavar="KEY=VALUE", help="of the recipe's configuration, for all trials", **again
    )
    top.add_argument(
        "--space",
        metavar="KEY=DOMAIN",
        help="[a, b], {low: 1e-4, high: 1, log: true}, or null: does not vary",
        **again,
    )
    top.add_argument(
        "--search", metavar="KIND", help="random, grid, tpe, gp; or {kind: grid, points: 3}"
    )
    top.add_argument(
        "--scheduler",
        metavar="KIND",
        help="none, asha, median, pbt; or {kind: asha, first: 5, reduction: 3}",
    )
    top.add_argument("--metric", help="what is searched for; default: of the recipe's first gate")
    top.add_argument("--mode", choices=("min", "max"), help="default: the direction of the gate")
    top.add_argument("--trials", metavar="N", help="default: 20, or all points of a grid")
    top.add_argument("--time-budget-s", metavar="SECONDS")
    top.add_argument("--max-concurrent", metavar="N", help="trials at a time; default: what fits")
    top.add_argument("--workers", metavar="N", help="of each trial: a data-parallel group")
    top.add_argument("--seed", metavar="N", help="of the search")
    top.add_argument(
        "--input",
        metavar="KIND=REF_OR_PATH",
        help="an artifact to start from: a run, a folder, or NAME@ALIAS of the registry",
        **again,
    )
    top.add_argument("--smoke", action="store_true", help="start from the recipe's smoke run")
    top.add_argument("--out", type=Path, metavar="DIR", help="the sweep's folder; default: new")
    top.add_argument("--resume", type=Path, metavar="SWEEP_DIR", help="go on with that sweep")
    return top


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        if arguments.list:
            return _list()
        if arguments.show is not None:
            if (path := Path(arguments.show)).is_dir():
                return _show_sweep(path)
            return _show_recipe(find(arguments.show))
        return _sweep(*(_resumed if arguments.resume is not None else _planned)(arguments))
    except PlatformError as error:
        _say(f"error: {error.message}")
        return BAD_INPUT if isinstance(error, ConfigError | InvalidInput) else FAILED
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return FAILED


def _planned(arguments: argparse.Namespace) -> tuple[Recipe[Any], Sweep, Path]:
    document = configuration.read(arguments.config) if arguments.config else {}
    name = arguments.name or document.get("recipe")
    if name is None:
        raise ConfigError(f"which recipe? Known: {', '.join(discover().recipes)}")
    recipe = find(name)
    smoke = recipe.smoke.model_dump(exclude_unset=True) if arguments.smoke else {}
    sweep = configuration.resolve(recipe, [{"config": smoke}, document, _options(arguments)])
    sweep = _with_artifacts(recipe, sweep)
    folder = arguments.out or RunFolder.fresh(Places.of().runs / "sweeps", recipe.name).path
    return recipe, sweep, folder.absolute()


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given on the command line, as a document like the file."""
    document: dict[str, Any] = {
        "config": with_settings({}, arguments.set),
        "space": dict(_assignment("--space", text) for text in arguments.space),
        "inputs": dict(map(_input, arguments.input)),
        **_changes(arguments),
    }
    for key in ("search", "scheduler", "metric", "mode", "seed"):
        if (given := getattr(arguments, key)) is not None:
            document[key] = configuration.load_yaml(given)
    return document


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """What may be given when a sweep goes on, too."""
    keys = ("trials", "time_budget_s", "max_concurrent", "workers")
    given = {key: getattr(arguments, key) for key in keys}
    return {k: configuration.load_yaml(text) for k, text in given.items() if text is not None}


def _resumed(arguments: argparse.Namespace) -> tuple[Recipe[Any], Sweep, Path]:
    """The sweep as it was asked for; only how much and where may differ."""
    folder = arguments.resume.absolute()
    sweep = _sweep_of(folder)
    for option in ("config", "set", "space", "search", "scheduler", "metric", "mode", "seed",
                   "input", "smoke", "out"):  # fmt: skip
        if getattr(arguments, option):
            raise ConfigError(f"--{option} cannot be changed with --resume; begin a new sweep")
    if arguments.name not in (None, sweep.recipe):
        raise ConfigError(f"{folder} is a sweep of {sweep.recipe}, not of {arguments.name}")
    recipe = find(sweep.recipe)
    tree = {**sweep.model_dump(), **_changes(arguments)}
    if sweep.search.kind == "grid" and tree["trials"] != sweep.trials:
        raise ConfigError(f"this sweep is a grid of {sweep.trials} points; leave out --trials")
    return recipe, validated(Sweep, tree, called="--resume"), folder


def _sweep(recipe: Recipe[Any], sweep: Sweep, folder: Path) -> int:
    from tune import progress, results
    from tune.sweep import run

    _say(f"{recipe.name}: {sweep.trials} trials for {sweep.metric} ({sweep.mode}) in {folder}")
    teller = progress.teller()
    needed = _hashes(sweep)
    try:
        with _held(needed, folder):
            trials = run(recipe, sweep, folder, watch=teller)
    finally:
        teller.close()
    results.show(sweep, trials, sys.stdout)
    if (said := results.verdict(recipe, sweep, trials)) is not None:
        print(said)
    for path in results.write(recipe, sweep, folder, trials):
        print(path)
    assert sweep.trials is not None
    if len(trials) < sweep.trials or any(not trial.status.over for trial in trials):
        _say(f"not at its end; to go on: python -m tune --resume {folder}")
        return FOUND if _out_of_time(sweep, folder) else INTERRUPTED
    _release(needed, folder)
    if results.measured(sweep, trials):
        return FOUND
    _say(f"no trial had a result; tracebacks are in {folder}/trials/*/error.txt")
    return NOTHING


def _out_of_time(sweep: Sweep, folder: Path) -> bool:
    from tune.journal import read

    budget = sweep.time_budget_s
    return budget is not None and read(folder).seconds >= budget


def _show_sweep(folder: Path) -> int:
    from tune import results
    from tune.journal import read

    sweep = _sweep_of(folder)
    trials = read(folder).trials
    results.show(sweep, trials, sys.stdout)
    if (text := results.best_yaml(find(sweep.recipe), sweep, trials)) is not None:
        print(f"\n{text}", end="")
    return FOUND


def _sweep_of(folder: Path) -> Sweep:
    sweep = configuration.read_resolved(folder)
    if sweep is None:
        raise ConfigError(f"{folder}: there is no sweep in this folder")
    return sweep


def _list() -> int:
    found = discover()
    width = max(map(len, found.recipes), default=0)
    for name, recipe in found.recipes.items():
        print(f"{name:<{width}}  {', '.join(recipe.space) or '(no space of its own)'}")
    for module, why in found.broken.items():
        _say(f"{module} cannot be used: {why}")
    return FOUND


def _show_recipe(recipe: Recipe[Any]) -> int:
    print(f"{recipe.name}: {recipe.summary}")
    for name, gate in recipe.gates.items():
        print(f"metric: {name} ({gate.mode}), gate {gate}")
    print("space:")
    for key, domain in spaces.dump(recipe.space).items():
        print(f"  {key}: {domain}")
    print(f"may vary: {', '.join(dict.fromkeys(key for key, _ in spaces.leaves(recipe.config)))}")
    return FOUND


def _with_artifacts(recipe: Recipe[Any], sweep: Sweep) -> Sweep:
    """Inputs and bases as folders, the same ones for all trials."""
    from train import inputs

    for key in recipe.bases:
        if inputs.REGISTRY in str(sweep.space.get(key)):
            raise ConfigError(
                f"{key}: what the registry has is the same for all trials here;"
                " make a sweep for each of its models"
            )
    base = spaces.configured(recipe.config, sweep.config, {})
    pinned = with_settings(sweep.config, inputs.pins(recipe, base, _version))
    config = spaces.configured(recipe.config, pinned, {})
    found = {
        **inputs.resolve(recipe, sweep.inputs, _from_registry),
        **inputs.bases(recipe, config, {}, _from_registry),
    }
    folders = {kind: str(path) for kind, path in found.items() if kind not in sweep.space}
    return sweep.model_copy(update={"config": pinned, "inputs": folders})


def _hashes(sweep: Sweep) -> dict[str, str]:
    from models import artifact

    return {kind: artifact.read(Path(path)).content_sha256 for kind, path in sweep.inputs.items()}


@contextmanager
def _held(needed: Mapping[str, str], folder: Path) -> Iterator[None]:
    """Nobody collects what the trials start from until the sweep is at its end."""
    if not needed:
        yield
        return
    from train import registered  # brings the database

    with registered.held(needed, by=folder.name, warn=_say):
        yield


def _release(needed: Mapping[str, str], folder: Path) -> None:
    if needed:
        from train import registered

        registered.release(needed, by=folder.name, warn=_say)


def _from_registry(reference: str) -> Path:
    from train import registered  # brings the database

    return registered.fetch(reference)


def _version(reference: str) -> str:
    from train import registered

    return registered.version(reference)


def _input(text: str) -> tuple[str, str]:
    kind, equals, reference = text.partition("=")
    if not (kind and equals and reference):
        raise ConfigError(f"--input {text}: expected KIND=RUN_DIR or KIND=NAME@ALIAS")
    return kind, reference


def _assignment(option: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{option} {text}: expected key=value")
    return key.strip(), configuration.load_yaml(value)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
