"""Answers as bytes, and back.

Never pickle: a cache that others can write to must not be able to run code. And not orjson,
which has neither minus infinity (the logarithm of what cannot be) nor half a surrogate pair.
What is not as we write it is nothing: a miss.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.contracts import Delta, FinishReason, TokenLogprob, TopLogprob, Usage, Versions

_JSON = json.JSONEncoder(separators=(",", ":"))
_EMBEDDING = struct.Struct("<cI")
"""The kind of number, and the tokens read."""
_STAMP = struct.Struct("<d")
_NUMBERS: dict[bytes, np.dtype[Any]] = {b"f": np.dtype("<f4"), b"d": np.dtype("<f8")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """One input's share of an embedding call."""

    vector: Sequence[float] | NDArray[np.float32]
    tokens: int


def whole(deltas: Sequence[Delta], n: int) -> list[Delta] | None:
    """The same answer with one delta a choice; ``None`` if it is not complete.

    Without timings: they tell of work that was done once.
    """
    usage = next((delta.usage for delta in reversed(deltas) if delta.usage is not None), None)
    versions = next((delta.versions for delta in deltas if delta.versions is not None), None)
    finished = {delta.index: delta for delta in deltas if delta.finish_reason is not None}
    if usage is None or finished.keys() != set(range(n)):
        return None
    answer = []
    for index in range(n):
        parts = [delta for delta in deltas if delta.index == index]
        logprobs = [delta.logprobs for delta in parts if delta.logprobs is not None]
        answer.append(
            Delta(
                index=index,
                text="".join([delta.text for delta in parts]),
                token_ids=tuple(chain.from_iterable(delta.token_ids for delta in parts)),
                logprobs=tuple(chain.from_iterable(logprobs)) if logprobs else None,
                prompt=next((delta.prompt for delta in parts if delta.prompt is not None), None),
                finish_reason=finished[index].finish_reason,
                usage=usage if index == n - 1 else None,
                versions=versions if index == 0 else None,
            )
        )
    return answer


def pack_answer(answer: Sequence[Delta]) -> bytes:
    """``answer`` as ``whole`` makes it."""
    usage = answer[-1].usage
    assert usage is not None
    packed = {
        "versions": answer[0].versions,
        "usage": [usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens],
        "choices": [
            [
                delta.text,
                delta.token_ids,
                delta.finish_reason,
                _packed(delta.logprobs),
                _packed(delta.prompt),
            ]
            for delta in answer
        ],
    }
    return _JSON.encode(packed).encode("ascii")


def unpack_answer(value: bytes, n: int) -> list[Delta] | None:
    """``None``: it is no answer of ``n`` choices."""
    try:
        packed = json.loads(value)
        prompt, completion, cached = packed["usage"]
        usage = Usage(
            prompt_tokens=int(prompt), completion_tokens=int(completion), cached_tokens=int(cached)
        )
        versions = packed["versions"]
        answer = [
            Delta(
                index=index,
                text=str(text),
                token_ids=tuple(token_ids),
                logprobs=_unpacked(logprobs),
                prompt=_unpacked(likely),
                finish_reason=FinishReason(finish_reason),
                usage=usage if index == n - 1 else None,
                versions=Versions(*versions) if versions is not None and index == 0 else None,
            )
            for index, (text, token_ids, finish_reason, logprobs, likely) in enumerate(
                packed["choices"]
            )
        ]
    except (ValueError, TypeError, KeyError):
        return None
    return answer if len(answer) == n else None


def pack_embedding(embedded: Embedded) -> bytes:
    vector = np.asarray(embedded.vector)
    kind = b"f" if vector.dtype == np.float32 else b"d"
    numbers: bytes = vector.astype(_NUMBERS[kind]).tobytes()
    return _EMBEDDING.pack(kind, embedded.tokens) + numbers


def unpack_embedding(value: bytes) -> Embedded | None:
    try:
        kind, tokens = _EMBEDDING.unpack_from(value)
        vector = np.frombuffer(value, _NUMBERS[kind], offset=_EMBEDDING.size)
    except (struct.error, KeyError, ValueError):
        return None
    return Embedded(vector=vector, tokens=tokens)


def stamped(value: bytes, at: float) -> bytes:
    """An entry that tells when, in Unix seconds, it was made."""
    return _STAMP.pack(at) + value


def unstamped(entry: bytes, now: float, max_age_s: float) -> bytes | None:
    """``None``: it was made longer ago than ``max_age_s``, or it is no entry."""
    try:
        [at] = _STAMP.unpack_from(entry)
    except struct.error:
        return None
    return entry[_STAMP.size :] if now - at <= max_age_s else None


def _packed(logprobs: Sequence[TokenLogprob] | None) -> list[Any] | None:
    if logprobs is None:
        return None
    return [
        [one.token_id, one.token, one.logprob, [[t.token_id, t.token, t.logprob] for t in one.top]]
        for one in logprobs
    ]


def _unpacked(packed: list[Any] | None) -> tuple[TokenLogprob, ...] | None:
    if packed is None:
        return None
    return tuple(
        TokenLogprob(
            token_id=token_id,
            token=token,
            logprob=logprob,
            top=tuple(TopLogprob(token_id=i, token=t, logprob=p) for i, t, p in top),
        )
        for token_id, token, logprob, top in packed
    )
