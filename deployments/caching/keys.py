"""Which requests have an answer of their own, and the key it is kept under. Pure.

A key is the SHA-256 of everything that the answer depends on, and of the tenant, who shares
with nobody. Prompts are taken as they stand: one blank more is another token, and another
answer. Normalised is only what cannot matter: the order of keys, ``1`` or ``1.0``, and a float
beyond nine digits, which is what was left over when somebody computed it; the engine draws in
float32, of seven.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TypeAlias

from models.contracts import Conversation, GenerateRequest, Prompt, Sampling

FORMAT = 4
"""Of keys and of entries: another number begins with an empty cache."""
DIGITS = 9
# All fields: one that is new in the contract must not be forgotten here.
_SAMPLING = {field.name: getattr(Sampling(), field.name) for field in fields(Sampling)}
# Not orjson: a prompt may hold half a surrogate pair, which that refuses.
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"))

Normal: TypeAlias = "str | int | float | list[Normal] | dict[str, Normal] | None"


def deterministic(request: GenerateRequest) -> bool:
    """Whether asking again would give the same answer."""
    return request.sampling.temperature == 0 or request.sampling.seed is not None


def generation_key(request: GenerateRequest, version: str) -> str:
    """What the answer to ``request`` is kept under. How it is sent, queued or called is not in it.

    Args:
        version: exactly what will answer; an adapter is part of that.
    """
    return digest(
        {
            "format": FORMAT,
            "kind": "generation",
            "tenant": request.tenant,
            "model": request.model,
            "version": version,
            "prompt": _prompt(request.prompt),
            "n": request.n,
            "sampling": {
                name: value
                for name, default in _SAMPLING.items()
                if (value := getattr(request.sampling, name)) != default
                and normal(value) != normal(default)
            },
            "otherwise": _DEFAULTS,
        }
    )


def embedding_key(text: str, *, tenant: str, model: str, version: str) -> str:
    """What the vector of ``text`` is kept under."""
    return digest(
        {
            "format": FORMAT,
            "kind": "embedding",
            "tenant": tenant,
            "model": model,
            "version": version,
            "input": text,
        }
    )


def normal(value: object) -> Normal:
    """``value`` as JSON that is the same wherever the meaning is.

    Raises:
        TypeError: it is nothing that JSON has.
    """
    if value is None or isinstance(value, str):  # as most is
        return value
    match value:
        case bool():
            return int(value)
        case float():
            value = float(f"{value:.{DIGITS}g}")
            return int(value) if value.is_integer() else value
        case int():
            return value
        case Mapping():
            return {str(key): normal(inner) for key, inner in value.items()}
        case Sequence():
            return [normal(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} has no place in a key")


def _prompt(prompt: Prompt) -> Mapping[str, object]:
    """The three kinds apart: a text is no conversation of one message."""
    if isinstance(prompt, str):
        return {"text": prompt}
    return asdict(prompt) if isinstance(prompt, Conversation) else {"tokens": prompt}


def digest(facts: Mapping[str, object]) -> str:
    """The SHA-256 of facts, the same wherever their meaning is."""
    return hashlib.sha256(_JSON.encode(normal(facts)).encode("ascii")).hexdigest()


_DEFAULTS = digest(_SAMPLING)
"""What the fields mean that a key leaves out."""
