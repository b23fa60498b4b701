"""Runs one step through a Hugging Face causal LM: tokens and slots in, logits out.

No line here knows a model by name: attention and cache are exchanged through
transformers' own interfaces, and at load ``fit`` refuses an architecture that would answer
nonsense.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deployments.config import EngineConfig
from deployments.engines.adapters import Adapter
from deployments.engines.attention import DecodeSpan, PrefillSpan, SlotAttention, Span
from deployments.engines.calibration import Kept
from deployments.engines.fit import check_fit, first_line, probe, probe_end
from deployments.engines.fused import OtherStructure
from deployments.engines.kv import SlotCache
from deployments.engines.linears import (
    TOLERANCE,
    Groups,
    as_linear,
    keep_few_compiled,
    pack_if_equal,
)
from deployments.engines.lora import LoraMixer, observed_targets
from deployments.engines.lora_file import LoraFile
from deployments.engines.precision import (
    WINDOW,
    as_good,
    house_text,
    int8_if_as_good,
    int8_units,
)
from deployments.engines.prefixes import BLOCK
from deployments.engines.sequence import Chunk, Save, Step
from models.errors import ConfigError

if TYPE_CHECKING:
    from deployments.engines.fused.decoder import FusedDecoder

_log = logging.getLogger(__name__)

INT8_TOLERANCE = 0.05
"""Largest accepted difference of a fused layer, relative to the largest value of what it changes.

Where a number lies between two of eight bits, the last digit of a float decides.
"""


class Ran(NamedTuple):
    """What one forward pass gives."""

    logits: torch.Tensor
    """``[rows, vocab_size]``, a row for each of ``chunks``."""
    chunks: tuple[Chunk, ...]
    """Those with ``samples``."""
    predicted: tuple[tuple[Chunk, torch.Tensor], ...]
    """The logits ``[predicts, vocab_size]`` of prompts' tokens."""


class Runner:
    """Owns model, KV slots and device. One thread uses it.

    Args:
        folder: config.json and safetensors.
        config: slots, context, dtype, device.

    Raises:
        ConfigError: the folder holds no causal LM, or one whose attention does not fit.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        keep_few_compiled()
        self.device = torch.device(config.device)
        self.dtype = _dtype(config, self.device)
        self.model = _load(folder, self.dtype, self.device)
        self.context = _context(self.model, config.context, folder)
        self.vocab_size: int = self.model.config.get_text_config().vocab_size
        self.blocks = config.prefix_cache.tokens // BLOCK
        self.cache = SlotCache(slots=config.slots, context=self.context, blocks=self.blocks)
        self._attention = SlotAttention(self.cache)
        own_attention = self.model.config._attn_implementation
        self._mixer = LoraMixer(self.model, self.device)
        self._fused: FusedDecoder | None = None
        try:
            with observed_targets(self.model) as targets:
                groups = check_fit(self)
            if self._in_int8(folder, config, groups, own_attention):
                self._fused = self._fused_if_equal(INT8_TOLERANCE)
            elif pack_if_equal(self.model, groups, partial(probe, self)):
                self._fused = self._fused_if_equal(TOLERANCE)
        except BaseException:
            self.close()
            raise
        del groups  # and with them the layers that were packed
        if self.device.type == "cpu":
            _let_go_of_file(self.model)
        self._max_rank = config.adapters.max_rank
        self._targets = targets

    def _in_int8(
        self, folder: Path, config: EngineConfig, groups: Groups, own_attention: str
    ) -> bool:
        """Whether the layers compute in int8 now.

        Raises:
            ConfigError: it was asked for, and cannot be.
        """
        wanted = config.dtype == "int8"
        if not (wanted or (config.dtype == "auto" and self.dtype == torch.float32)):
            return False
        if not (wanted or int8_units()):
            _log.info("%s computes in float32: this processor has no int8 units", folder.name)
            return False
        began = time.monotonic()
        self.model.set_attn_implementation(own_attention)
        window = min(WINDOW, self.context)
        quality = int8_if_as_good(
            self.model,
            groups,
            partial(house_text, folder),
            window=window,
            kept=Kept(folder, window),
        )
        self.attach()
        if quality is None or not as_good(quality):
            judged = "there is nothing to judge it by" if quality is None else quality
            if wanted:
                raise ConfigError(
                    f"{folder.name} does not answer as well in int8 ({judged}); set engine.dtype to"
                    " float32, or to auto, which chooses by itself."
                )
            _log.warning("%s computes in float32; in int8: %s", folder.name, judged)
            return False
        took = time.monotonic() - began
        _log.info("%s computes in int8: %s (found in %.1f s)", folder.name, quality, took)
        return True

    def _fused_if_equal(self, tolerance: float) -> FusedDecoder | None:
        name = type(self.model).__name__
        try:
            # Here, for Numba takes 70 MB, which whoever computes elsewhere does without.
            from deployments.engines.fused.decoder import FusedDecoder

            fused = FusedDecoder(self.model, self.cache, self._attention)
            with fused.compared() as differences:
                probe(self)
                probe_end(self)
        except OtherStructure as error:
            _log.info("%s is computed by its own modules: %s", name, error)
            return None
        # It only looks like one that is known; or Numba has no folder for what it compiles.
        except Exception as error:
            _log.warning("%s is computed by its own modules: %s", name, error)
            return None
        if not all(each <= tolerance for each in differences):
            most = max(differences)
            _log.warning("%s is computed by its own modules, which differ: %.2g", name, most)
            return None
        return fused

    def attach(self) -> None:
        """Exchange the model's attention for that over the slots."""
        self.model.set_attn_implementation(self._attention.name)

    def open_adapter(self, name: str, folder: Path) -> LoraFile:
        """From any thread.

        Raises:
            InvalidInput: it is none, or none that fits this model.
        """
        return LoraFile(
            name,
            folder,
            self._targets,
            max_rank=self._max_rank,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def run(self, step: Step) -> Ran:
        """One forward pass."""
        self.cache.move(step.moves)
        single: Sequence[Chunk] = sorted(
            (c for c in step.chunks if len(c.tokens) == 1), key=lambda c: c.slot
        )
        several = [c for c in step.chunks if len(c.tokens) > 1]
        several.sort(key=_adapter_number)  # so that rows with one adapter lie together
        single = self._adapt(single, several)
        chunks = (*single, *several)

        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        last: list[int] = []
        inner: list[int] = []
        for chunk in chunks:
            end = chunk.start + len(chunk.tokens)
            tokens += chunk.tokens
            positions += range(chunk.start, end)
            base = chunk.slot * self.context
            rows += range(base + chunk.start, base + end)
            if chunk.samples:
                last.append(len(tokens) - 1)
            if chunk.predicts:
                begin = len(tokens) - len(chunk.tokens)
                inner += range(begin, begin + chunk.predicts)
        position_row = self._tensor(positions)

        spans: list[Span] = []
        if single:
            slots = self._tensor([c.slot for c in single])
            spans.append(DecodeSpan(slots, position_row[: len(single)]))
        begin = len(single)
        for chunk in several:
            span = slice(begin, begin + len(chunk.tokens))
            spans.append(PrefillSpan(span, chunk.slot, position_row[span]))
            begin = span.stop

        self._attention.begin(spans)
        # a step of nothing but unfinished prompts still needs one row to be well formed
        keep = self._tensor([*last, *inner] or [0])
        logits = self._forward(self._tensor(tokens), position_row, self._tensor(rows), keep)
        predicted = tuple([c for c in chunks if c.predicts])
        sizes = [len(last), *(c.predicts for c in predicted)]
        logits, *others = logits[: sum(sizes)].split(sizes)
        samples = tuple([c for c in chunks if c.samples])
        return Ran(logits, samples, tuple(zip(predicted, others, strict=True)))

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """Logits of the rows ``keep``."""
        additions = self._mixer.additions
        if self._fused is not None and self._fused.takes(additions):
            return self._fused(tokens, positions, rows, keep, additions)
        self.cache.place(rows)
        logits: torch.Tensor = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits[0]
        return logits

    def _adapt(self, single: Sequence[Chunk], several: Sequence[Chunk]) -> Sequence[Chunk]:
        """Tell the mixer of the pass; ``single`` in the order that it wants."""
        runs: list[tuple[slice, Adapter]] = []
        begin = len(single)
        for chunk in several:
            span = slice(begin, begin + len(chunk.tokens))
            begin = span.stop
            adapter = chunk.sequence.call.adapter
            if adapter is None:
                continue
            if runs and runs[-1][1] is adapter:
                span = slice(runs.pop()[0].start, span.stop)
            runs.append((span, adapter))
        order = self._mixer.begin([c.sequence.call.adapter for c in single], runs)
        return single if order is None else [single[row] for row in order]

    @torch.inference_mode()
    def save(self, saves: Sequence[Save]) -> None:
        """Keep parts of slots for later requests."""
        self.cache.save(saves)

    @torch.inference_mode()
    def wipe(self, slot: int, length: int) -> None:
        """Remove what a failed sequence left in its slot."""
        self.cache.wipe(slot, length)

    def close(self) -> None:
        self._attention.close()

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """Of weights as they are loaded, and of all that is not computed in int8."""
    if config.dtype == "int8" and device.type != "cpu":
        raise ConfigError(f"engine.dtype int8 is for the CPU; on {device.type}, take auto.")
    if config.dtype == "int8" or (config.dtype == "auto" and device.type == "cpu"):
        return torch.float32
    if config.dtype == "auto":
        return torch.bfloat16
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def _adapter_number(chunk: Chunk) -> int:
    adapter = chunk.sequence.call.adapter
    return adapter.number if adapter is not None else 0


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} holds no causal language model: {first_line(error)}"
        ) from error
    as_linear(model)
    return model.to(device).eval()


def _context(model: PreTrainedModel, asked: int | None, folder: Path) -> int:
    """Tokens a sequence may have."""
    config = model.config.get_text_config()
    trained: int | None = getattr(config, "max_position_embeddings", None)
    context = asked or trained
    if context is None:
        raise ConfigError(f"{folder} does not say how long its context is; set engine.context.")
    if asked is not None and trained is not None and asked > trained:
        raise ConfigError(
            f"engine.context is {asked}, but {folder.name} was trained for {trained} tokens."
        )
    # Attention in blocks of this many tokens is the plain one up to there (Llama 4).
    block: int | None = getattr(config, "attention_chunk_size", None)
    if block is not None and context > block:
        raise ConfigError(
            f"{folder.name} attends in blocks of {block} tokens, which the embedded engine does not"
            f" compute; set engine.context to at most {block} (it is {context})."
        )
    return context


def _let_go_of_file(model: PreTrainedModel) -> None:
    """Copy what is left of the weight file, so that its mapping, packed layers and all, can go; and
    give back what loading took besides.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
