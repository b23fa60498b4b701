"""Cross-entropy in chunks equals torch's own, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from train.recipes.llm.loss import CHUNK, token_losses


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 7])
def test_losses_and_gradients_are_those_of_torch(tokens: int, frozen: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=torch.float64).requires_grad_(not frozen)
    hidden = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (tokens,))
    weights = torch.rand(tokens)
    results = []
    for losses in (
        token_losses(hidden, head, targets),
        cross_entropy(head(hidden).float(), targets, reduction="none"),
    ):
        hidden.grad = head.weight.grad = None
        (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
        results.append((losses.detach(), hidden.grad, head.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (results[0][2] is None) == frozen


def test_evaluation_needs_no_gradient() -> None:
    head = nn.Linear(4, 9, bias=False)
    with torch.no_grad():
        losses = token_losses(torch.randn(3, 4), head, torch.tensor([0, 1, 8]))
    assert losses.shape == (3,)
    assert not losses.requires_grad
