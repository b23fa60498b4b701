"""GGUF → safetensors, once: ``python -m models.gguf FILE.gguf FOLDER``.

Numbers are stored as float32, which is what unpacking gives: 4-bit blocks with a
half-precision scale and offset have no exact 16-bit form.
"""

from __future__ import annotations

import errno
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

from models import child
from models.errors import ConfigError, Unavailable

DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
"""Values of ``tokenizer.ggml.pre`` whose merges were learned with every digit on its own.
llama.cpp splits at ``\\p{N}`` for them; transformers 5.23 does not, so that ``"\\n\\n1."``
would become other tokens than those the model was trained on."""

EXPANSION = 8
"""Bytes of float32 weights for a byte of 4-bit blocks."""


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    PACKAGE_MISSING = 3
    DISK_FULL = 4


def convert(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template and ``model.safetensors`` of ``gguf`` to ``folder``.

    Works in a process of its own, which gives torch's memory back when it ends.

    Raises:
        ConfigError: the file is not one that transformers reads, or a package is missing.
        Unavailable: the converter was killed.
        OSError: the disk is full.
    """
    ran = child.run("models.gguf", str(gguf), str(folder), env={"HF_HUB_OFFLINE": "1"})
    if ran.returncode == Exit.DONE:
        return
    if ran.returncode < 0:
        raise Unavailable(
            f"{gguf.name}: the conversion to safetensors was killed by signal {-ran.returncode}; "
            "if memory ran out: it needs about "
            f"{2 * EXPANSION * gguf.stat().st_size / 1e9:.1f} GB"
        )
    silence = f"{gguf.name}: the conversion ended with status {ran.returncode} and no message"
    reason = (ran.stderr.strip().splitlines() or [silence])[-1]
    if ran.returncode == Exit.DISK_FULL:
        raise OSError(errno.ENOSPC, reason)
    raise ConfigError(reason)


def write_safetensors(gguf: Path, folder: Path) -> None:
    """The conversion itself, in this process."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        GenerationConfig,
        GgufConfig,
        PreTrainedTokenizerFast,
    )
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(gguf))
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    # AutoTokenizer would give the same, after reading the whole vocabulary once more for a config
    tokenizer = PreTrainedTokenizerFast.from_pretrained(**where)
    if metadata.get("tokenizer.ggml.pre") in DIGITS_APART:
        _set_digits_apart(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer.model_max_length = getattr(
        model.config, "max_position_embeddings", tokenizer.model_max_length
    )
    # A chat model may end a turn (eot) with another token than a document (eos).
    ends = {tokenizer.eos_token_id, metadata.get("tokenizer.ggml.eot_token_id")} - {None}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends) if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _set_digits_apart(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def main(arguments: list[str]) -> Exit:
    if len(arguments) != 2:
        print("usage: python -m models.gguf FILE.gguf FOLDER", file=sys.stderr)
        return Exit.USAGE
    gguf, folder = map(Path, arguments)
    try:
        write_safetensors(gguf, folder)
    except ImportError as error:
        advice = f"a package is missing ({_line(error)}): pip install 'frontier-run[gguf]'"
        status = Exit.PACKAGE_MISSING
    except Exception as error:  # a parser of foreign files may raise anything
        full = _disk_full(error)
        advice = _line(error) if full else f"{_line(error)}; use a model published as safetensors"
        status = Exit.DISK_FULL if full else Exit.FAILED
    else:
        return Exit.DONE
    print(f"{gguf.name} cannot be converted to safetensors: {advice}", file=sys.stderr)
    return status


def _disk_full(error: Exception) -> bool:
    # safetensors says it as text only
    return getattr(error, "errno", None) == errno.ENOSPC or "(os error 28)" in str(error)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
