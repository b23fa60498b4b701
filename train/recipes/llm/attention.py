"""Causal attention of many documents in one row, each seeing only itself.

A row is ``[1, tokens]``: documents side by side, positions restarting at 0, no padding. A
model calls ``PackedAttention`` in place of its own attention (transformers'
``AttentionInterface``); it runs one causal attention a document. A dense block-diagonal
mask would cost the square of the row instead of the sum of the documents' squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from models import exotic_attention
from models.errors import ConfigError


class PackedAttention:
    """The attention function of one model, registered under a name of its own."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self.name = f"frontier_packed_{id(self):x}"
        AttentionInterface.register(self.name, self)

    def begin(self, lengths: Sequence[int]) -> None:
        """Tokens of each document of the row that follows, until its backward pass is done:
        activation checkpointing runs its forward pass again.
        """
        self._lengths = list(lengths)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths differ from row to row
    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``query [1, heads, tokens, dim]`` → ``[1, tokens, heads, dim]``."""
        if (name := exotic_attention.asked_for(kwargs)) is not None:
            raise ConfigError(
                f"{type(module).__name__} uses attention with '{name}', which packed training"
                " does not compute; fine-tune another model."
            )
        group = query.shape[1] // key.shape[1]
        if group > 1:
            key = key.repeat_interleave(group, dim=1)
            value = value.repeat_interleave(group, dim=1)
        # split, not slices: its gradient is one concatenation
        rows = [torch.split(part, self._lengths, dim=2) for part in (query, key, value)]
        outputs = []
        for q, k, v in zip(*rows, strict=True):
            mask = _window(q.shape[2], sliding_window, q)
            outputs.append(
                scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=mask is None,
                    scale=scaling,
                )
            )
        out = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        return out.transpose(1, 2).contiguous(), None

    def close(self) -> None:
        """Unregister; the model cannot run afterwards."""
        AttentionInterface._global_mapping.pop(self.name, None)


def _window(length: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """True where a token may look back to, for a document longer than the window."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=like.device)
    back = position[:, None] - position
    return (back >= 0) & (back < window)
