"""Model card, data card and licence inventory, from the facts in manifests and nothing else.

What a manifest does not say is written as unknown: nobody's prose goes stale here. The
headings follow Mitchell et al., Model Cards for Model Reporting (2019), and Gebru et al.,
Datasheets for Datasets (2021), as far as facts reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from models.artifact import Manifest

UNKNOWN = "unknown"


def model_card(manifest: Manifest) -> str:
    """Markdown."""
    run, data = manifest.run, manifest.data
    lines = [
        f"# {_text(manifest.name)}",
        "",
        *_table(
            ("", ""),
            [
                ("Kind", manifest.kind),
                ("Licence", manifest.licence),
                ("Content SHA-256", f"`{manifest.content_sha256}`"),
                ("Sealed", manifest.created),
                ("Size", f"{manifest.size:,} bytes in {len(manifest.files)} files"),
                ("Loader", f"`{manifest.loader}`" if manifest.loader else "none"),
            ],
        ),
        "",
        "## Training",
        "",
    ]
    if run is None:
        lines += ["Unknown: the manifest names no run.", ""]
    else:
        facts = [
            ("Recipe", run.recipe),
            ("Run", run.id),
            ("Seed", str(run.seed)),
            ("Code", run.code_revision),
        ]
        lines += [*_table(("", ""), facts), ""]
    if manifest.parents:
        lines += ["Made from:", "", *(f"- `{parent}`" for parent in manifest.parents), ""]
    lines += ["## Data", "", _text(data.description) or "Unknown.", ""]
    lines += [
        *_table(
            ("", ""), [("SHA-256", data.sha256 and f"`{data.sha256}`"), ("Licence", data.licence)]
        ),
        "",
        "## Evaluation",
        "",
    ]
    if manifest.gates:
        rows = [
            (gate.metric, _number(gate.value), gate.expected, "passed" if gate.passed else "FAILED")
            for gate in manifest.gates
        ]
        lines += [*_table(("gate", "reached", "expected", ""), rows), ""]
    else:
        lines += ["No gates.", ""]
    if manifest.metrics:
        values = [(name, _number(value)) for name, value in sorted(manifest.metrics.items())]
        lines += [*_table(("metric", "value"), values), ""]
    lines += ["## Configuration", ""]
    settings = [(f"`{_text(key)}`", value) for key, value in _flat(manifest.config)]
    lines += [*_table(("key", "value"), settings), ""] if settings else ["None.", ""]
    lines += ["## Files", ""]
    lines += _table(
        ("file", "bytes", "SHA-256"),
        [
            (f"`{path}`", f"{file.size:,}", f"`{file.sha256}`")
            for path, file in sorted(manifest.files.items())
        ],
    )
    return "\n".join(lines) + "\n"


def data_card(manifest: Manifest) -> str:
    """Markdown: what the model learned from."""
    data = manifest.data
    lines = [
        f"# Data of {_text(manifest.name)}",
        "",
        _text(data.description) or "Unknown: the manifest does not describe it.",
        "",
        *_table(
            ("", ""),
            [
                ("SHA-256", data.sha256 and f"`{data.sha256}`"),
                ("Licence", data.licence),
                ("Used by", f"{manifest.name} `{manifest.content_sha256}`"),
                ("Run", manifest.run.id if manifest.run else ""),
                ("Read on", manifest.created),
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Licences:
    """One model in the inventory."""

    version: str
    artifact: str
    model: str
    """SPDX, or ``unknown``."""
    data: str


def licences(artifacts: Iterable[tuple[str, Manifest]]) -> list[Licences]:
    """What may be done with each version, given as (version, manifest)."""
    return [
        Licences(
            version=version,
            artifact=manifest.content_sha256,
            model=manifest.licence or UNKNOWN,
            data=manifest.data.licence or UNKNOWN,
        )
        for version, manifest in artifacts
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    made = [line([_text(cell) or UNKNOWN for cell in row]) for row in rows]
    return [line(head), f"|{'---|' * len(head)}", *made]


def _text(text: str) -> str:
    """On one line, and unable to end a cell of a table or to begin HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"


def _flat(config: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in sorted(config.items()):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value is None else str(value)
