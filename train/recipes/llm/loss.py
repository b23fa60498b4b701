"""Cross-entropy of a large vocabulary without its logits in memory.

``[tokens, vocabulary]`` logits are by far the largest tensor of a small model's step. Here
they exist for a few hundred tokens at a time, and only where there is a target. With a
frozen head the gradient of the hidden states is taken while the logits are at hand, so
they are computed once (the idea of Liger's fused linear cross-entropy, Hsu et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.recipes.llm.frozen import Frozen

CHUNK = 256
"""Tokens whose logits exist at a time."""


def token_losses(
    hidden: torch.Tensor,
    head: nn.Linear,
    targets: torch.Tensor,
    frozen: Frozen | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each target, float32.

    Args:
        hidden: ``[tokens, width]``, after the last norm.
        head: without a bias.
        targets: ``[tokens]``.
        frozen: the head's weight, packed.
    """
    losses: torch.Tensor = _TokenLosses.apply(hidden, head.weight, targets, frozen)  # type: ignore[no-untyped-call]
    return losses


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        frozen: Frozen | None,
    ) -> torch.Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        weight_like = weight.to(hidden.dtype)
        slopes = None
        if need_hidden and not need_weight:
            slopes = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(targets), CHUNK):
            part = slice(begin, begin + CHUNK)
            logits = frozen.forward(hidden[part]) if frozen else hidden[part] @ weight_like.t()
            shares, total, losses[part] = _softmax(logits.float(), targets[part])
            if slopes is not None:  # softmax minus one at the target, times the weight
                shares = shares.to(hidden.dtype)
                mean = frozen.backward(shares) if frozen else shares @ weight_like
                slopes[part] = mean / total[:, None] - weight[targets[part]]
        ctx.dtype, ctx.recompute = hidden.dtype, need_weight
        if need_weight:
            ctx.save_for_backward(hidden, weight, targets)
        elif slopes is not None:
            ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(
        ctx: Any, *outer: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (scale,) = outer
        if not ctx.recompute:
            (slopes,) = ctx.saved_tensors
            return (slopes * scale[:, None]).to(ctx.dtype), None, None, None
        hidden, weight, targets = ctx.saved_tensors
        weight_like = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for begin in range(0, len(targets), CHUNK):
            part = slice(begin, begin + CHUNK)
            logits = (hidden[part] @ weight_like.t()).float()
            shares, total, _ = _softmax(logits, targets[part])
            slope = shares.mul_((scale[part] / total)[:, None])
            slope[torch.arange(len(slope), device=slope.device), targets[part]] -= scale[part]
            slope = slope.to(hidden.dtype)
            grad_hidden[part] = slope @ weight_like
            grad_weight += slope.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _softmax(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numerators ``[chunk, vocabulary]`` in place of ``logits``, denominators and losses.

    ``logsumexp`` takes nine times as long on the CPU.
    """
    logits -= logits.amax(dim=-1, keepdim=True)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    shares = logits.exp_()
    total = shares.sum(dim=-1)
    return shares, total, total.log() - chosen
