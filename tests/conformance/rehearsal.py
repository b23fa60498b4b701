"""What the suite does in processes of its own; each prints one JSON object as its last line.

::

    python -m tests.conformance.rehearsal imports
    python -m tests.conformance.rehearsal smoke RECIPE OUT INPUTS
    python -m tests.conformance.rehearsal predict ARTIFACT SAMPLES
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAVY = (
    *("ray", "torch", "transformers", "peft", "sklearn", "scipy", "pandas", "matplotlib"),
    *("statsmodels", "statsforecast", "onnx", "onnxruntime", "optuna", "numba", "pyod"),
)
"""What importing a recipe must not bring."""

NONSENSE: tuple[Any, ...] = (None, {"no such field": 1}, "nonsense", [None], -1)
"""No input of any model is all of these; each predictor refuses at least the first two."""


def imports() -> dict[str, list[str]]:
    """Recipe module → the heavy libraries that importing it brought."""
    import pkgutil

    from train import recipes

    brought = {}
    for module in pkgutil.iter_modules(recipes.__path__):
        before = set(sys.modules)
        __import__(f"{recipes.__name__}.{module.name}")
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        brought[module.name] = sorted(new & set(HEAVY))
    return brought


def smoke(name: str, out: str, inputs: str) -> dict[str, Any]:
    """A smoke run, watched: what it wrote elsewhere, and how much work it was."""
    folder = Path(out)
    elsewhere = _watch(folder)

    from train.discover import find
    from train.folder import RunFolder
    from train.run import run

    recipe = find(name)
    result = run(
        recipe,
        recipe.smoke,
        folder=RunFolder(folder),
        smoke=True,
        inputs={kind: Path(path) for kind, path in json.loads(inputs).items()},
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "metrics": {k: v if math.isfinite(v) else None for k, v in result.metrics.items()},
        "failed": [gate.metric for gate in result.gates if not gate.passed],
        "kind": recipe.kind,
        "cpu_s": used.ru_utime + used.ru_stime,
        "elsewhere": sorted(elsewhere),
    }


def _watch(out: Path) -> set[str]:
    """Paths outside of ``out`` that this process writes to, from now on.

    Temporary files are allowed where temporary files go; the suite looks whether they went
    again. So are what is cached once a machine, and byte code.
    """
    allowed = [
        str(out.resolve()),
        str(Path(tempfile.gettempdir()).resolve()),
        os.environ["FRONTIER_CACHE"],
        os.environ["MPLCONFIGDIR"],
        *("/dev/", "/proc/"),
    ]
    seen: set[str] = set()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        match event:
            case "open" if isinstance(arguments[2], int) and arguments[2] & writing:
                paths = arguments[:1]
            case "os.mkdir" | "os.remove" | "os.rmdir" if arguments[-1] == -1:
                paths = arguments[:1]  # removing a tree names files relative to open folders
            case "os.rename":
                paths = arguments[:2]
            case _:
                return
        for path in paths:
            if isinstance(path, str | bytes):
                full = os.path.realpath(os.fsdecode(path))
                if not full.startswith(tuple(allowed)) and "__pycache__" not in full:
                    seen.add(full)

    sys.addaudithook(look)
    return seen


def predict(artifact: str, samples: str) -> dict[str, Any]:
    """Load the artifact as serving does, and ask it in several ways."""
    from models.artifact import load
    from models.errors import InvalidInput

    inputs = json.loads(Path(samples).read_text())
    predictor = load(Path(artifact))
    strangers = sorted({name.partition(".")[0] for name in sys.modules} & {"train", "tune", "ray"})

    def refusal(batch: list[Any]) -> dict[str, Any]:
        try:
            answer = predictor.predict_batch(batch)
        except InvalidInput as error:
            return {"index": error.details.get("index"), "message": error.message}
        except Exception as error:
            return {"raised": f"{type(error).__name__}: {error}"}
        return {"answered": repr(answer)}

    def ask(batch: list[Any]) -> list[Any]:
        return list(predictor.predict_batch(batch))

    return {
        "strangers": strangers,
        "together": ask(inputs),
        "again": ask(inputs),
        "backwards": ask(inputs[::-1]),
        "alone": [ask([each])[0] for each in inputs],
        "threefold": ask(inputs * 3),
        "nothing": ask([]),
        "refusals": [refusal([inputs[0], bad, inputs[0]]) for bad in NONSENSE],
    }


if __name__ == "__main__":
    what: dict[str, Callable[..., Any]] = {"imports": imports, "smoke": smoke, "predict": predict}
    answer = what[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps(answer, allow_nan=False))
