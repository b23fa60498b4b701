"""From ``data:`` of the configuration to units of tokens, to train on and held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from train.recipes.llm import builtin, rows
from train.recipes.llm.config import LlmConfig
from train.recipes.llm.encoding import Unit, encode
from train.recipes.llm.rows import BadRow, Origin, Preference, Skipped
from train.recipes.llm.split import split


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    train: list[Unit]
    held_out: list[Unit]
    skipped: list[Skipped]
    facts: dict[str, Any]
    """For the data card: hash of the rows, their number, description, licence."""

    def write(self, out: Path) -> None:
        """``data.json``, and ``bad_rows.jsonl`` where there are any."""
        (out / "data.json").write_text(json.dumps(self.facts, indent=2) + "\n")
        if self.skipped:
            lines = (json.dumps(asdict(bad)) + "\n" for bad in self.skipped)
            (out / "bad_rows.jsonl").write_text("".join(lines))


def load(config: LlmConfig, tokenizer: Any) -> Data:
    """Raises ConfigError: nothing to read, or a bad row that must not be skipped."""
    skipped: list[Skipped] = []
    train = _read(config, config.data.train, skipped)
    if config.data.validation is None:
        train, held_out = split(train, config.data.held_out)
    else:
        held_out = _read(config, config.data.validation, skipped)
    _check_objective(config, train[0])
    digest = _digest([*train, *held_out])
    units = [_encode(config, part, tokenizer, skipped) for part in (train, held_out)]
    sources = _sources(config)
    built_in = [builtin.describe(s) for s in sources if s.startswith(builtin.PREFIX)]
    facts = {
        "sha256": digest,
        "description": "; ".join(b.description for b in built_in) or ", ".join(sources),
        "licence": " AND ".join(sorted({b.licence for b in built_in})) or None,
        "rows": len(train),
        "rows_held_out": len(held_out),
        "rows_skipped": len(skipped),
    }
    return Data(
        train=units[0],
        held_out=_sample(units[1], config.data.evaluation_tokens),
        skipped=skipped,
        facts=facts,
    )


def tokens(unit: Unit) -> int:
    return sum(len(example) for example in unit)


def _sources(config: LlmConfig) -> list[str]:
    given = (config.data.train, config.data.validation or ())
    return [s for part in given for s in ([part] if isinstance(part, str) else part)]


def _read(config: LlmConfig, sources: str | Sequence[str], skipped: list[Skipped]) -> list[Origin]:
    found: list[Origin] = []
    for source in [sources] if isinstance(sources, str) else sources:
        if source.startswith(builtin.PREFIX):
            if config.data.format not in ("auto", "text"):
                raise ConfigError(f"{source} is text, but data.format is {config.data.format}")
            found += builtin.load(source)
        else:
            good, bad = rows.read(source, config.data.format, on_bad_row=config.data.on_bad_row)
            found += good
            skipped += bad
    return found


def _check_objective(config: LlmConfig, origin: Origin) -> None:
    pairs = isinstance(origin.row, Preference)
    if pairs != (config.training.objective == "dpo"):
        raise ConfigError(
            f"{origin.where} is {'a preference' if pairs else 'no preference'}, which"
            f" training.objective {config.training.objective} cannot learn from"
        )


def _encode(
    config: LlmConfig, origins: Sequence[Origin], tokenizer: Any, skipped: list[Skipped]
) -> list[Unit]:
    units: list[Unit] = []
    for origin in origins:
        try:
            units += encode(origin.row, tokenizer, config.training.sequence_length)
        except BadRow as error:
            rows.refuse(origin.where, str(error), skipped, config.data.on_bad_row)
    if not units:
        raise ConfigError(f"no row of {', '.join(_sources(config))} has anything to learn from")
    return units


def _sample(units: list[Unit], limit: int | None) -> list[Unit]:
    """About ``limit`` tokens of all over, always the same ones."""
    if limit is None:
        return units
    order = list(range(len(units)))
    random.Random(0).shuffle(order)
    chosen: list[int] = []
    for index in order:
        if limit <= 0:
            break
        chosen.append(index)
        limit -= tokens(units[index])
    return [units[index] for index in sorted(chosen)]


def _digest(origins: Sequence[Origin]) -> str:
    """Of all rows in order, whatever file they stand in."""
    digest = hashlib.sha256()
    for origin in origins:
        digest.update(origin.row.model_dump_json().encode() + b"\n")
    return digest.hexdigest()
