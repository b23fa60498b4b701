"""Attention maps where the truth is known: which word of a sentence the answer was read from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

LENGTH = 12
WORDS = 16


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """How much of each input position reaches each output position, through all layers.

    Abnar, Zuidema 2020, Quantifying Attention Flow in Transformers: heads are averaged, the
    residual connection counts as much as attention, layers are multiplied.

    Args:
        attentions: per layer, shape (batch, heads, to, from): what transformers returns with
            ``output_attentions=True``.

    Returns:
        Shape (batch, to, from); rows add up to 1.
    """
    eye = torch.eye(attentions[0].shape[-1])
    flow = eye.expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        flow = ((attention.mean(1) + eye) / 2) @ flow
    return flow


class Reader(nn.Module):
    """A small transformer that answers with the one marked word of a sentence."""

    def __init__(self, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        # a word, the same word marked, and the place where the answer is asked for
        self.words = nn.Embedding(2 * WORDS + 1, width)
        self.places = nn.Embedding(LENGTH + 1, width)
        self.attend = nn.ModuleList(
            nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.answer = nn.Linear(width, WORDS)

    def forward(self, words: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (batch, words), and the attention of each layer."""
        hidden = self.words(words) + self.places.weight
        attentions = []
        for attend, norm in zip(self.attend, self.norms, strict=True):
            plain = norm(hidden)
            mixed, attention = attend(plain, plain, plain, average_attn_weights=False)
            hidden = hidden + mixed
            attentions.append(attention)
        return self.answer(hidden[:, -1]), attentions


def sentences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Words (count, LENGTH + 1), the marked place of each, and the word there."""
    words = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    place = torch.randint(0, LENGTH, (count,), generator=generator)
    answer = words[torch.arange(count), place]
    words[torch.arange(count), place] += WORDS
    return torch.cat([words, torch.full((count, 1), 2 * WORDS)], 1), place, answer


def attention_metrics(steps: int, seed: int) -> dict[str, float]:
    """``attention_hits``: how often rollout points to the marked word, among 500 sentences."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Reader()
    optimizer = torch.optim.Adam(reader.parameters(), lr=3e-3)
    for _ in range(steps):
        words, _, answer = sentences(128, generator)
        loss = functional.cross_entropy(reader(words)[0], answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    words, place, answer = sentences(500, generator)
    with torch.no_grad():
        logits, attentions = reader(words)
    flow = rollout(attentions)[:, -1, :LENGTH]  # what reaches the answer, but for itself
    return {
        "reader_accuracy": (logits.argmax(1) == answer).double().mean().item(),
        "attention_hits": (flow.argmax(1) == place).double().mean().item(),
    }
