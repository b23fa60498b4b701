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

CHUNK = 256
"""Tokens whose logits exist at a time."""


def token_losses(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, float32.

    Args:
        hidden: ``[tokens, width]``, after the last norm.
        head: without a bias.
        targets: ``[tokens]``.
    """
    losses: torch.Tensor = _TokenLosses.apply(hidden, head.weight, targets)  # type: ignore[no-untyped-call]
    return losses


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        need_hidden, need_weight, _ = ctx.needs_input_grad
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        like = weight.to(hidden.dtype)
        slopes = None
        if need_hidden and not need_weight:
            slopes = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(targets), CHUNK):
            part = slice(begin, begin + CHUNK)
            logits, losses[part] = _logits(hidden[part], like, targets[part])
            if slopes is not None:
                slopes[part] = _slope(logits, targets[part]).to(hidden.dtype) @ like
        ctx.dtype = hidden.dtype
        ctx.recompute = need_weight
        if need_weight:
            ctx.save_for_backward(hidden, weight, targets)
        elif slopes is not None:
            ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(
        ctx: Any, *outer: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (scale,) = outer
        if not ctx.recompute:
            (slopes,) = ctx.saved_tensors
            return (slopes * scale[:, None]).to(ctx.dtype), None, None
        hidden, weight, targets = ctx.saved_tensors
        like = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for begin in range(0, len(targets), CHUNK):
            part = slice(begin, begin + CHUNK)
            logits, _ = _logits(hidden[part], like, targets[part])
            slope = _slope(logits, targets[part]).mul_(scale[part, None]).to(hidden.dtype)
            grad_hidden[part] = slope @ like
            grad_weight += slope.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities ``[chunk, vocabulary]`` and the losses ``[chunk]``."""
    logits = (hidden @ weight.t()).float()
    total = logits.logsumexp(dim=-1)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    return logits.sub_(total[:, None]), total - chosen


def _slope(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of the loss by the logits: softmax minus one at the target. In place."""
    slope = log_probabilities.exp_()
    slope[torch.arange(len(targets), device=targets.device), targets] -= 1
    return slope
