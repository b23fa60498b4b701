"""Sentence embeddings: a Hugging Face encoder, mean pooling, unit length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from deployments.engines.linears import keep_few_compiled, observed_groups, pack_if_equal
from models.contracts import Json
from models.errors import ConfigError, InvalidInput

FORWARD_COST_TOKENS = 24
"""What starting a forward pass costs, in tokens of computing (MiniLM on one CPU thread:
7.5 ms against 0.3 ms a token). So much padding is worth one pass less."""


class Embedding(TypedDict):
    """Output of one input."""

    embedding: NDArray[np.float32]
    """Shape (dimensions,), unit length. An array, not a list: half the bytes between processes
    and in JSON, where ``orjson.OPT_SERIALIZE_NUMPY`` writes the shortest float32 digits."""
    tokens: int
    """With the tokenizer's own start and end marks."""


class SentenceEncoder:
    """A Predictor: strings in, ``Embedding`` out.

    Args:
        folder: a transformers model and tokenizer, in safetensors.
        max_tokens: longer inputs are refused, never cut in silence.
        threads: torch threads of the whole process (torch knows no other kind).

    Raises:
        ConfigError: the model cannot read ``max_tokens``; it has fewer positions.
    """

    def __init__(
        self, folder: Path, *, max_tokens: int = 256, threads: int = 1, device: str = "cpu"
    ) -> None:
        torch.set_num_threads(threads)
        self._device = device
        keep_few_compiled()
        self._max_tokens = max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._pad = self._tokenizer.pad_token_id or 0
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model = model.to(device).eval()
        words = self._tokenizer("warm up")["input_ids"]
        try:  # the first pass is slow, and the only sure way to learn what fits
            with observed_groups(self._model) as groups:
                self._encode([(words * max_tokens)[:max_tokens]])
        except (IndexError, RuntimeError) as error:
            raise ConfigError(
                f"max_tokens is {max_tokens}, but the model at {folder} cannot read that many:"
                f" {error}",
                param="max_tokens",
            ) from error
        pack_if_equal(self._model, groups, lambda: torch.from_numpy(self._encode([words])))

    def predict_batch(self, inputs: Sequence[Json]) -> Sequence[Json]:
        """Raises InvalidInput, with ``details["index"]``, before anything is computed."""
        rows = self._tokenize(inputs)
        outputs: list[Embedding | None] = [None] * len(rows)
        for places in micro_batches([len(row) for row in rows], FORWARD_COST_TOKENS):
            vectors = self._encode([rows[place] for place in places])
            for place, vector in zip(places, vectors, strict=True):
                # A copy, or the last vector in use would keep the others of its batch alive.
                outputs[place] = Embedding(embedding=vector.copy(), tokens=len(rows[place]))
        return cast("Sequence[Json]", outputs)  # Json, but for the arrays

    def _tokenize(self, inputs: Sequence[Json]) -> list[list[int]]:
        texts = [_text(value, index) for index, value in enumerate(inputs)]
        if not texts:
            return []
        encoded = self._tokenizer(texts, return_attention_mask=False, verbose=False)
        rows = cast("list[list[int]]", encoded["input_ids"])
        for index, row in enumerate(rows):
            if len(row) > self._max_tokens:
                raise InvalidInput(
                    f"The input has {len(row)} tokens; this model reads {self._max_tokens}"
                    " at most. Split the text.",
                    param="input",
                    details={"index": index, "tokens": len(row), "max_tokens": self._max_tokens},
                )
        return rows

    @torch.inference_mode()
    def _encode(self, rows: list[list[int]]) -> NDArray[np.float32]:
        """(rows, dimensions), unit length."""
        longest = max(map(len, rows))
        ids_bt = torch.full((len(rows), longest), self._pad)
        mask_bt = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            ids_bt[index, : len(row)] = torch.tensor(row)
            mask_bt[index, : len(row)] = 1
        ids_bt, mask_bt = ids_bt.to(self._device), mask_bt.to(self._device)
        hidden_btd = self._model(input_ids=ids_bt, attention_mask=mask_bt).last_hidden_state
        weight_bt1 = mask_bt.unsqueeze(-1).to(hidden_btd.dtype)
        mean_bd = (hidden_btd * weight_bt1).sum(1) / weight_bt1.sum(1)
        unit_bd = torch.nn.functional.normalize(mean_bd, dim=-1)
        return cast("NDArray[np.float32]", unit_bd.cpu().numpy())


def micro_batches(lengths: Sequence[int], forward_cost: int) -> list[list[int]]:
    """Split a batch by length so that the whole costs least.

    A pass over ``r`` rows padded to ``t`` tokens costs ``forward_cost + r * t``. The best
    split takes neighbours in order of length; dynamic programming finds it in O(n²).

    Returns:
        Places in ``lengths``, each once.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    best = [0.0] + [float("inf")] * len(order)  # cost of the first n of the order
    start = [0] * (len(order) + 1)  # where the last pass of that split begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        for begin in range(end):
            cost = best[begin] + forward_cost + (end - begin) * longest
            if cost < best[end]:
                best[end], start[end] = cost, begin
    passes: list[list[int]] = []
    end = len(order)
    while end:
        passes.append(order[start[end] : end])
        end = start[end]
    return passes[::-1]


def _text(value: Json, index: int) -> str:
    if not isinstance(value, str):
        problem = f"The input must be a string, not {type(value).__name__}."
    elif not value.strip():
        problem = "The input is empty; there is nothing to embed."
    elif not _is_unicode(value):
        problem = "The input holds half a surrogate pair, which is no character."
    else:
        return value
    raise InvalidInput(problem, param="input", details={"index": index})


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
