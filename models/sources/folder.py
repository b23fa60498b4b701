"""A model folder: what transformers loads from disk without running anyone's code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from models.errors import ConfigError

SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Weights, configuration, tokenizer and chat template. Never pickles, never code."""


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_weights(files: Iterable[Path]) -> str:
    """One hash for a model's weights.

    Of one file its own; of several that of ``sha256sum`` over their names in order, so
    that ``sha256sum *.safetensors | sha256sum`` says the same in a shell.
    """
    ordered = sorted(files, key=lambda file: file.name)
    if len(ordered) == 1:
        return sha256_file(ordered[0])
    listing = "".join(f"{sha256_file(file)}  {file.name}\n" for file in ordered)
    return hashlib.sha256(listing.encode()).hexdigest()


def expect_sha256(called: str, found: str, expected: str | None) -> None:
    """Raises ConfigError if ``expected`` is given and another."""
    if expected is not None and found != expected:
        raise ConfigError(
            f"{called}: the weights have sha256 {found}, expected {expected}; "
            "do not use them unless you know why they changed, then give that sha256"
        )


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def check(folder: Path, called: str | None = None) -> None:
    """Look at every file's header, not at every byte. ``called``: its name in errors.

    Raises:
        ConfigError: no folder, no ``config.json``, no safetensors, or a file cut short.
    """
    called = called or str(folder)
    if not folder.is_dir():
        hint = (
            f"; convert it first: python -m models.gguf {folder} FOLDER"
            if folder.suffix == ".gguf"
            else ""
        )
        raise ConfigError(f"{called} is not a folder; expected one with a model's files{hint}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{called} has no config.json; expected a Hugging Face model folder")
    if not isinstance(_json(folder / "config.json", called), dict):
        raise ConfigError(f"{called}: config.json is not a JSON object; fetch it again")
    shards = weights(folder)
    if not shards:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        found = f" but {', '.join(pickles)}, and a pickle runs code when loaded" if pickles else ""
        raise ConfigError(
            f"{called} has no *.safetensors{found}; "
            "expected weights that a current save_pretrained wrote"
        )
    for shard in shards:
        _check_safetensors(shard, called)
    _check_index(folder / "model.safetensors.index.json", called)


def _json(file: Path, called: str) -> object:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{called}: {file.name} is not JSON ({error}); fetch it again") from None


def _check_safetensors(file: Path, called: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass  # opening compares the header with the file's size
    except SafetensorError as error:
        raise ConfigError(
            f"{called}: {file.name} is damaged or cut short ({error}); fetch it again"
        ) from None


def _check_index(file: Path, called: str) -> None:
    if not file.exists():
        return
    match _json(file, called):
        case {"weight_map": dict(named)}:
            missing = sorted(n for n in set(named.values()) if not (file.parent / n).is_file())
        case _:
            raise ConfigError(f"{called}: {file.name} has no weight_map; fetch it again")
    if missing:
        raise ConfigError(f"{called} lacks {', '.join(missing)}, which {file.name} names")
