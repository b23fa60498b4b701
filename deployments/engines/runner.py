"""Runs one step through a Hugging Face causal LM: tokens and slots in, logits out.

No line here knows a model by name: attention and cache are exchanged through
transformers' own interfaces, and at load the packed path is held against the model's own
``forward``, so an architecture that does not fit is refused instead of answering nonsense.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deployments.config import EngineConfig
from deployments.engines.attention import DecodeSpan, PrefillSpan, SlotAttention, Span
from deployments.engines.kv import SlotCache
from deployments.engines.linears import pack_linears
from deployments.engines.sequence import Chunk, Step
from models.errors import ConfigError

SELF_CHECK_TOKENS = 12
SELF_CHECK_TOLERANCE = 0.02
"""Largest accepted relative difference of the logits; reduced precision is checked loosely."""


class Runner:
    """Owns model, KV slots and device. One thread uses it.

    Args:
        folder: config.json and safetensors.
        config: slots, context, dtype, device.

    Raises:
        ConfigError: the folder holds no causal LM, or one whose attention does not fit.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.model = _load(folder, self.dtype, self.device)
        self.context = _context(self.model, config.context, folder)
        self.vocab_size: int = self.model.config.get_text_config().vocab_size
        self.cache = SlotCache(slots=config.slots, context=self.context)
        self._attention = SlotAttention(self.cache)
        self._check_fit()
        pack_linears(self.model)

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[torch.Tensor, tuple[Chunk, ...]]:
        """One forward pass.

        Returns:
            logits ``[rows, vocab_size]`` and, row by row, the chunks they belong to: those
            with ``samples``.
        """
        for copy in step.copies:
            self.cache.copy(copy.source, copy.target, copy.length)
        single = sorted((c for c in step.chunks if len(c.tokens) == 1), key=lambda c: c.slot)
        several = [c for c in step.chunks if len(c.tokens) > 1]
        chunks = (*single, *several)

        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        last: list[int] = []
        for chunk in chunks:
            end = chunk.start + len(chunk.tokens)
            tokens += chunk.tokens
            positions += range(chunk.start, end)
            base = chunk.slot * self.context
            rows += range(base + chunk.start, base + end)
            if chunk.samples:
                last.append(len(tokens) - 1)
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

        self.cache.place(self._tensor(rows))
        self._attention.begin(spans)
        logits = self.model(
            input_ids=self._tensor(tokens)[None],
            position_ids=position_row[None],
            past_key_values=self.cache,
            use_cache=True,
            # a step of nothing but unfinished prompts still needs one row to be well formed
            logits_to_keep=self._tensor(last or [0]),
        ).logits[0]
        return logits[: len(last)], tuple(c for c in chunks if c.samples)

    def wipe(self, slot: int, length: int) -> None:
        """Remove what a failed sequence left in its slot."""
        self.cache.wipe(slot, length)

    def close(self) -> None:
        self._attention.close()

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def _check_fit(self) -> None:
        """Hold the packed path against the model's own attention on a few tokens."""
        name = type(self.model).__name__
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocab_size, (SELF_CHECK_TOKENS,), generator=generator)
        expected = self.model(input_ids=tokens[None].to(self.device), use_cache=False).logits[0]
        try:
            self.model.set_attn_implementation(self._attention.name)
            got = self._check_pass(tokens.to(self.device))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{name} does not run on the embedded engine ({type(error).__name__}: {error});"
                " it needs attention through transformers' AttentionInterface."
            ) from error
        scale = expected.abs().max().clamp(min=1e-6)
        difference = float((got - expected).abs().max() / scale)
        tolerance = SELF_CHECK_TOLERANCE if self.dtype.itemsize >= 4 else 0.1
        if not difference <= tolerance:
            raise ConfigError(
                f"{name} gives other logits on the embedded engine than on its own"
                f" (relative difference {difference:.2g}); its attention is not a plain causal one."
            )

    def _check_pass(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of all ``tokens``: half as a chunk, then the others one by one, in slot 1."""
        half = len(tokens) // 2
        slot = min(1, self.cache.slots - 1)
        logits = []
        for start, end in [(0, half), *((i, i + 1) for i in range(half, len(tokens)))]:
            positions = torch.arange(start, end, device=self.device)
            self.cache.place(positions + slot * self.context)
            span: Span
            if end - start > 1:
                span = PrefillSpan(slice(0, end - start), slot, positions)
            else:
                span = DecodeSpan(self._tensor([slot]), positions)
            self._attention.begin([span])
            logits.append(
                self.model(
                    input_ids=tokens[None, start:end],
                    position_ids=positions[None],
                    past_key_values=self.cache,
                    use_cache=True,
                ).logits[0]
            )
        return torch.cat(logits)


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no causal language model: {error}") from error
    return model.to(device).eval()


def _context(model: PreTrainedModel, asked: int | None, folder: Path) -> int:
    """Tokens a sequence may have."""
    trained: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = asked or trained
    if context is None:
        raise ConfigError(f"{folder} does not say how long its context is; set engine.context.")
    if asked is not None and trained is not None and asked > trained:
        raise ConfigError(
            f"engine.context is {asked}, but {folder.name} was trained for {trained} tokens."
        )
    return context
