"""From ``data:`` of the configuration to units of tokens, to train on and held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from models.errors import ConfigError
from train import data
from train.recipe import RunContext
from train.recipes.llm import builtin, rows
from train.recipes.llm.config import LlmConfig
from train.recipes.llm.encoding import Unit, encode
from train.recipes.llm.rows import BadRow, Origin, Preference, Skipped
from train.recipes.llm.split import split


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the data card says of one of ``data.train`` and ``data.validation``."""

    name: str
    sha256: str
    """Of the rows, in order, whatever files they stand in."""
    licence: str
    rows: int
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    train: list[Unit]
    held_out: list[Unit]
    skipped: list[Skipped]
    sources: list[Source]

    def record(self, context: RunContext) -> None:
        """Say what was learned from, and which rows were not."""
        for source in self.sources:
            data.record(**asdict(source))
        if self.skipped and context.workers.rank == 0:
            lines = (json.dumps(asdict(bad)) + "\n" for bad in self.skipped)
            (context.out / "bad_rows.jsonl").write_text("".join(lines))


def load(config: LlmConfig, tokenizer: Any) -> Data:
    """Raises ConfigError: nothing to read, or a bad row that must not be skipped."""
    skipped: list[Skipped] = []
    sources: list[Source] = []
    train = _read(config, config.data.train, sources, skipped)
    if config.data.validation is None:
        train, held_out = split(train, config.data.held_out)
    else:
        held_out = _read(config, config.data.validation, sources, skipped)
    _check_objective(config, train[0])
    units = _encode(config, held_out, tokenizer, skipped)
    return Data(
        train=_encode(config, train, tokenizer, skipped),
        held_out=_sample(units, config.data.evaluation_tokens),
        skipped=skipped,
        sources=sources,
    )


def tokens(unit: Unit) -> int:
    return sum(len(example) for example in unit)


def _read(
    config: LlmConfig,
    names: str | Sequence[str],
    sources: list[Source],
    skipped: list[Skipped],
) -> list[Origin]:
    found: list[Origin] = []
    for name in [names] if isinstance(names, str) else names:
        licence, description = config.data.licence, name
        if name.startswith(builtin.PREFIX):
            if config.data.format not in ("auto", "text"):
                raise ConfigError(f"{name} is text, but data.format is {config.data.format}")
            good = builtin.load(name)
            known = builtin.describe(name)
            licence, description = known.licence, known.description
        else:
            good, bad = rows.read(name, config.data.format, on_bad_row=config.data.on_bad_row)
            skipped += bad
        found += good
        sources.append(
            Source(
                name=name,
                sha256=_digest(good),
                licence=licence,
                rows=len(good),
                description=description,
            )
        )
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
        raise ConfigError(f"{origins[0].where} and all other rows have nothing to learn from")
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
    digest = hashlib.sha256()
    for origin in origins:
        digest.update(origin.row.model_dump_json().encode() + b"\n")
    return digest.hexdigest()
