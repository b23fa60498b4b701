"""From logits to the next token, each row by its own parameters and its own randomness.

Order, for a row: repetition penalty (Keskar et al. 2019), frequency and presence penalty,
logit bias, the grammar of the answer (``grammar.py``), temperature, top-k, top-p (Holtzman et
al. 2020), min-p (Nguyen et al. 2024). Then one uniform number a token picks by inverse
transform: a sequence draws its own numbers from its own seed, so the same seed gives the same
tokens whatever else runs.

Rows are grouped by what they need: plain greedy rows, the common case, cost one argmax
over all of them together.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from deployments.engines.grammar import Constraint
from models.contracts import Sampling

CANDIDATES = 256
"""Likeliest tokens that are sorted first; rows whose nucleus is wider are sorted whole."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The outcome for one row.

    Attributes:
        token: the id drawn; ``None`` if the logits were not finite.
        logprob: of ``token``, before penalties, temperature and truncation; ``None`` unless asked.
        top: the likeliest ids with their log-probabilities, likeliest first.
    """

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False, slots=True)
class SamplerState:
    """What one sequence needs to draw: its parameters, its random numbers, its history."""

    sampling: Sampling
    random: random.Random
    prompt: tuple[int, ...]
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was drawn."""
    constraint: Constraint | None = None

    @classmethod
    def start(
        cls,
        sampling: Sampling,
        prompt: tuple[int, ...],
        choice: int,
        constraint: Constraint | None = None,
    ) -> SamplerState:
        """``choice`` tells the ``n`` continuations of a seeded request apart."""
        seed = None if sampling.seed is None else f"{sampling.seed}/{choice}"
        return cls(
            sampling=sampling, random=random.Random(seed), prompt=prompt, constraint=constraint
        )

    def drew(self, token: int) -> None:
        """Raises InvalidInput: the constraint takes more to follow than is allowed."""
        self.counts[token] += 1
        if self.constraint is not None:
            self.constraint.accept(token)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def shapes_logits(self) -> bool:
        s = self.sampling
        return bool(
            s.logit_bias or s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
        )

    @property
    def truncates(self) -> bool:
        return self.sampling.top_k > 0 or self.sampling.top_p < 1 or self.sampling.min_p > 0


@torch.inference_mode()
def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[Drawn]:
    """Draw one token a row; what a row gets depends on no other row.

    Args:
        logits: ``[rows, vocabulary]``; rows that need shaping are overwritten.
        states: one a row. Their random numbers advance; ``drew`` is left to the caller.
    """
    if logits.dtype.itemsize < 4:  # sums over a vocabulary need more digits
        logits = logits.float()
    logprobs = [_Logprobs(logits[i], s.sampling.logprobs) for i, s in enumerate(states)]
    for i, state in enumerate(states):
        if state.shapes_logits:
            _shape(logits[i], state)
        if state.constraint is not None:
            state.constraint.forbid(logits[i])
    best, tokens = logits.max(dim=-1)
    finite = torch.isfinite(best).tolist()  # NaN and +inf win every max
    drawn = tokens.tolist()
    random_rows = [i for i, s in enumerate(states) if not s.greedy and finite[i]]
    if random_rows:
        chosen = _draw(logits[random_rows], [states[i] for i in random_rows])
        for i, token in zip(random_rows, chosen, strict=True):
            drawn[i] = token
    return [
        row.of(token) if ok else Drawn(None)
        for ok, token, row in zip(finite, drawn, logprobs, strict=True)
    ]


def logprobs_of(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Drawn]:
    """Tokens that were not drawn but came, as if they had been.

    Args:
        logits: ``[rows, vocabulary]``.
        tokens: one a row.
        top: how many of the likeliest to tell beside it.
    """
    return [_Logprobs(row, top).of(token) for row, token in zip(logits, tokens, strict=True)]


class _Logprobs:
    """The log-probabilities that a row's client asked for, taken before shaping."""

    def __init__(self, row: torch.Tensor, top: int | None) -> None:
        self._row = None if top is None else torch.log_softmax(row.double(), dim=-1)
        self._top = top or 0

    def of(self, token: int) -> Drawn:
        if self._row is None:
            return Drawn(token)
        values, ids = self._row.topk(self._top)
        return Drawn(
            token, float(self._row[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
        )


def _shape(row: torch.Tensor, state: SamplerState) -> None:
    """Apply penalties and bias to ``row [vocabulary]`` in place."""
    s = state.sampling
    if s.repetition_penalty != 1:
        seen = torch.tensor(list({*state.prompt, *state.counts}), device=row.device)
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / s.repetition_penalty, values * s.repetition_penalty
        )
    if state.counts and (s.presence_penalty or s.frequency_penalty):
        ids = torch.tensor(list(state.counts), device=row.device)
        counts = torch.tensor(list(state.counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= s.presence_penalty + s.frequency_penalty * counts
    if s.logit_bias:
        ids = torch.tensor(list(s.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(s.logit_bias.values()), dtype=row.dtype, device=row.device)


def _draw(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    """One token a row of ``[rows, vocabulary]``, all with a temperature above 0."""
    temperature = logits.new_tensor([s.sampling.temperature for s in states])
    temperature.clamp_(min=torch.finfo(logits.dtype).tiny)
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    probabilities = torch.softmax(scaled, dim=-1)
    uniform = logits.new_tensor([s.random.random() for s in states])
    tokens = torch.empty(len(states), dtype=torch.long, device=logits.device)
    whole = [i for i, s in enumerate(states) if not s.truncates]
    if whole:
        tokens[whole] = _inverse_transform(probabilities[whole], uniform[whole])
    truncated = [i for i, s in enumerate(states) if s.truncates]
    if truncated:
        tokens[truncated] = _truncated(
            probabilities[truncated], uniform[truncated], [states[i].sampling for i in truncated]
        )
    drawn: list[int] = tokens.tolist()
    return drawn


def _truncated(
    probabilities: torch.Tensor, uniform: torch.Tensor, samplings: Sequence[Sampling]
) -> torch.Tensor:
    """Draw from the kept part of each row, in order of falling probability."""
    vocabulary = probabilities.shape[-1]
    width = min(vocabulary, CANDIDATES)
    values, ids = probabilities.topk(width)
    kept = keep(values, samplings, vocabulary)
    picked = _pick(kept, ids, uniform)
    full = (kept[:, -1] > 0).tolist()
    wide = [i for i, s in enumerate(samplings) if _undecided(s, width, vocabulary, full=full[i])]
    if wide:
        values, ids = probabilities[wide].sort(dim=-1, descending=True)
        kept = keep(values, [samplings[i] for i in wide], vocabulary)
        picked[wide] = _pick(kept, ids, uniform[wide])
    return picked


def _undecided(sampling: Sampling, width: int, vocabulary: int, *, full: bool) -> bool:
    """Whether what is kept cannot be told from the ``width`` likeliest tokens alone.

    Args:
        full: all of them were kept, so the kept part may go on behind them.
    """
    top_k = _top_k(sampling, vocabulary)
    if top_k <= width:
        return False
    return full or (top_k < vocabulary and sampling.top_p < 1)  # top-p is of top-k's mass


def _top_k(sampling: Sampling, vocabulary: int) -> int:
    return min(sampling.top_k or vocabulary, vocabulary)


def keep(ordered: torch.Tensor, samplings: Sequence[Sampling], vocabulary: int) -> torch.Tensor:
    """Zero what top-k, top-p and min-p cut off.

    Args:
        ordered: ``[rows, candidates]``, each row the largest probabilities, falling.
        samplings: one a row.
        vocabulary: what ``top_k = 0`` means.

    Returns:
        The same shape, not normalised; the likeliest token always stays.
    """
    top_k = torch.tensor([_top_k(s, vocabulary) for s in samplings], device=ordered.device)
    # 1 means no limit, also where rounding brings the sum of a row to 1 before its end
    top_p = ordered.new_tensor([s.top_p if s.top_p < 1 else 2.0 for s in samplings])
    min_p = ordered.new_tensor([s.min_p for s in samplings])
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    kept = ordered * (rank < top_k[:, None])
    # top-p is of what top-k left; without top-k the mass behind the candidates counts too
    mass = torch.where(top_k < vocabulary, kept.sum(-1), torch.ones_like(top_p))
    before = kept.cumsum(-1) - kept
    kept = kept * (before < (top_p * mass)[:, None])
    kept = kept * (kept >= min_p[:, None] * ordered[:, :1])
    kept[:, 0] = ordered[:, 0]
    return kept


def _pick(kept: torch.Tensor, ids: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    return ids.gather(1, _inverse_transform(kept, uniform)[:, None])[:, 0]


def _inverse_transform(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index per row, with probability proportional to ``weights``."""
    cumulative = weights.cumsum(-1)
    target = (uniform * cumulative[:, -1])[:, None]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # rounding may point behind the last token that has any weight
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)
