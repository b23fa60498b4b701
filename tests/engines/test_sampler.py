"""Draws held against transformers' own processors, hand-computed values and statistics."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deployments.engines.sampler import CANDIDATES, Drawn, SamplerState, sample
from models.contracts import Sampling

PROMPT = (1, 5, 5, 7)
DRAWS = 4_000


class Told(random.Random):
    """Gives the number it was told."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def random(self) -> float:
        return self.number


def state(
    sampling: Sampling, number: float | None = None, counts: dict[int, int] | None = None
) -> SamplerState:
    made = SamplerState.start(sampling, PROMPT, choice=0)
    if number is not None:
        made.random = Told(number)
    made.counts = Counter(counts or {})
    return made


def draw(logits: torch.Tensor, *states: SamplerState) -> list[int | None]:
    """Tokens; ``logits`` is one row for all, or a row each."""
    rows = logits.expand(len(states), -1) if logits.dim() == 1 else logits
    return [row.token for row in sample(rows.clone(), states)]


def reference(logits: torch.Tensor, sampling: Sampling, drawn: list[int]) -> torch.Tensor:
    """The distribution that transformers draws from."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    ids = torch.tensor([[*PROMPT, *drawn]])
    return torch.softmax(processors(ids, logits[None].clone())[0], dim=-1)


def assert_draws_from(
    expected: torch.Tensor, logits: torch.Tensor, sampling: Sampling, drawn: list[int]
) -> None:
    """Each token answers to an interval of numbers as long as its probability, and no other does.

    The intervals lie in order of falling probability where the tail is cut, else by id.
    """
    order = torch.arange(len(expected))
    if state(sampling).truncates:
        order = expected.argsort(descending=True, stable=True)
    widths = expected[order]
    ends = widths.cumsum(0)
    chosen = [i for i in range(len(order)) if widths[i] > 1e-7]
    margin = 1e-3
    numbers = [float(ends[i] - widths[i] * margin) for i in chosen]
    numbers += [float(ends[i] - widths[i] * (1 - margin)) for i in chosen]
    counts = dict(Counter(drawn))
    got = draw(logits, *(state(sampling, min(u, 1 - 1e-16), counts) for u in numbers))
    assert got == [int(order[i]) for i in chosen] * 2


def shown(sampling: Sampling) -> str:
    """What differs from the defaults."""
    values = {f.name: getattr(sampling, f.name) for f in fields(Sampling)}
    return ",".join(f"{k}={v}" for k, v in values.items() if v != getattr(Sampling(), k)) or "plain"


CASES = [
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(temperature=1.7),
    Sampling(top_k=1),
    Sampling(top_k=5),
    Sampling(top_k=10_000),
    Sampling(top_p=0.4),
    Sampling(top_p=0.95),
    Sampling(top_p=0.01),
    Sampling(min_p=0.1),
    Sampling(min_p=1.0),
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.7),
    Sampling(temperature=0.8, top_k=20, top_p=0.8),
    Sampling(temperature=1.2, top_p=0.9, min_p=0.05),
    Sampling(temperature=0.9, top_k=30, top_p=0.85, min_p=0.02, repetition_penalty=1.1),
]


@pytest.mark.parametrize("sampling", CASES, ids=shown)
def test_distribution_equals_transformers(sampling: Sampling) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(60, generator=generator, dtype=torch.float64) * 3
        drawn = [2, 2, 9]
        assert_draws_from(reference(logits, sampling, drawn), logits, sampling, drawn)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=0.9),
        Sampling(top_k=300),
        Sampling(top_k=500, top_p=0.9),  # top-p is of what 500 tokens weigh, not 256
        Sampling(top_k=CANDIDATES),
        Sampling(min_p=0.2),
        Sampling(top_k=700, top_p=0.7, min_p=0.1),
    ],
    ids=shown,
)
def test_a_nucleus_wider_than_the_candidates(sampling: Sampling) -> None:
    logits = torch.randn(800, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2
    expected = reference(logits, sampling, [])
    assert (expected > 0).sum() >= CANDIDATES
    assert_draws_from(expected, logits, sampling, [])


def test_presence_and_frequency_penalty_by_hand() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    counts = {1: 3, 2: 1}
    # 1: 3 - 0.5 - 3*0.4 = 1.3;  2: 2 - 0.5 - 0.4 = 1.1; a token of the prompt alone stays
    shaped = torch.tensor([1.0, 1.3, 1.1, 0.5], dtype=torch.float64)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.4)
    assert_draws_from(torch.softmax(shaped, 0), logits, sampling, [1, 1, 1, 2])
    greedy = replace(sampling, temperature=0.0, frequency_penalty=0.6)
    assert draw(logits, state(greedy, counts=counts)) == [0]


def test_logit_bias_by_hand() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    shaped = torch.tensor([1.0, 3.0 - 100, 2.0, 0.5 + 1.25], dtype=torch.float64)
    sampling = Sampling(logit_bias={1: -100, 3: 1.25})
    assert_draws_from(torch.softmax(shaped, 0), logits, sampling, [])
    assert draw(logits, state(replace(sampling, temperature=0.0))) == [2]


def test_penalties_come_in_their_documented_order() -> None:
    logits = torch.tensor([4.0, -0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    sampling = Sampling(
        repetition_penalty=2.0, presence_penalty=0.5, logit_bias={0: -1.0}, temperature=0.5
    )
    shaped = torch.zeros(8, dtype=torch.float64)
    shaped[0] = (4 / 2 - 0.5 - 1) / 0.5  # drawn: repetition, presence; then bias, temperature
    shaped[1] = (-0.5 * 2) / 0.5  # in the prompt: repetition alone
    shaped[2] = 1 / 0.5
    assert_draws_from(torch.softmax(shaped, 0), logits, sampling, drawn=[0])


def test_greedy_is_the_likeliest_whatever_else_is_asked() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    best = int(logits.argmax())
    for sampling in CASES:
        if sampling.repetition_penalty == 1:
            assert draw(logits, state(replace(sampling, temperature=0.0))) == [best]


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-30, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([1.0, 5.0, 4.9, -3.0])
    for number in (0.0, 0.5, 1 - 1e-16):
        assert draw(logits, state(Sampling(temperature=temperature), number)) == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.95), Sampling(min_p=0.01)])
def test_reduced_precision_does_not_bend_the_distribution(
    dtype: torch.dtype, sampling: Sampling
) -> None:
    """The sum over a vocabulary in bfloat16 stops growing at 256 equal parts."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(2)).to(dtype)
    numbers = [i / 500 for i in range(500)]
    low = draw(logits, *(state(sampling, u) for u in numbers))
    assert low == draw(logits.float(), *(state(sampling, u) for u in numbers))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_k=12, top_p=0.9), Sampling(min_p=0.05, temperature=1.5)]
)
def test_frequencies_of_draws(sampling: Sampling) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = reference(logits, sampling, [])
    one_stream = state(replace(sampling, seed=7))
    many_seeds = [state(replace(sampling, seed=seed)) for seed in range(DRAWS)]
    for states in ([one_stream] * DRAWS, many_seeds):
        counts = Counter(draw(logits, *states))
        likely = [i for i in range(20) if expected[i] > 0]
        assert set(counts) <= set(likely)
        wanted = {i: float(expected[i]) * DRAWS for i in likely}
        chi_square = sum((counts[i] - wanted[i]) ** 2 / wanted[i] for i in likely)
        freedom = len(likely) - 1
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


def test_a_seed_and_a_choice_determine_the_draws() -> None:
    logits = torch.zeros(1000)

    def tokens(seed: int | None, choice: int = 0) -> list[int | None]:
        made = SamplerState.start(Sampling(seed=seed), PROMPT, choice)
        return [draw(logits, made)[0] for _ in range(10)]

    assert tokens(1) == tokens(1)
    assert tokens(-(2**63)) == tokens(-(2**63))
    different = [tokens(1), tokens(2), tokens(1, 1), tokens(11, 0), tokens(None), tokens(None)]
    assert len({tuple(t) for t in different}) == len(different)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 40, 300, 10_000]),
    top_p=st.sampled_from([0.1, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    logit_bias=st.sampled_from([{}, {3: 2.0}]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@given(
    st.lists(st.tuples(samplings, st.floats(0, 1, exclude_max=True)), min_size=1, max_size=6),
    st.integers(0, 5),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_a_row_depends_on_no_other(
    rows: list[tuple[Sampling, float]], seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), 400, generator=generator, dtype=dtype)
    logits = (logits * 4).round() / 4  # many equal ones, whose order nothing else may decide
    states = [state(sampling, number, {2: 1, 4: 2}) for sampling, number in rows]
    together = sample(logits.clone(), states)
    alone = [sample(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(states)]
    assert together == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = torch.randn(6, 400, generator=torch.Generator().manual_seed(4))
    samplings = [
        Sampling(temperature=0.0),
        Sampling(),
        Sampling(top_p=0.5),
        Sampling(logprobs=2),
        Sampling(repetition_penalty=2.0),
        Sampling(min_p=0.01),
    ]

    def states() -> list[SamplerState]:
        return [state(sampling, 0.3) for sampling in samplings]

    healthy = sample(logits.clone(), states())
    for row in range(6):
        broken = logits.clone()
        broken[row, 100] = bad
        got = sample(broken, states())
        assert got[row] == Drawn(None)
        assert got[:row] + got[row + 1 :] == healthy[:row] + healthy[row + 1 :]
    assert sample(torch.full((1, 9), -math.inf), [state(Sampling())]) == [Drawn(None)]


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.full((300,), -math.inf)
    logits[[10, 20]] = 0.0
    for sampling in (Sampling(), Sampling(top_p=0.99), Sampling(top_k=5), Sampling(top_k=280)):
        got = draw(logits, *(state(sampling, u) for u in (0.0, 0.49, 0.51, 1 - 1e-16)))
        assert got[0] == got[1] != got[2] == got[3]
        assert set(got) == {10, 20}


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(5))
    expected = torch.log_softmax(logits.double(), dim=-1)
    shaped = Sampling(
        logprobs=4, temperature=0.1, top_k=3, repetition_penalty=5.0, logit_bias={9: 50.0}
    )
    rows = sample(logits.clone(), [state(shaped), state(Sampling(logprobs=0))])
    assert rows[0].token == 9
    for i, row in enumerate(rows):
        assert row.token is not None
        assert row.logprob == pytest.approx(float(expected[i, row.token]), abs=1e-9)
    values, ids = expected[0].topk(4)
    assert [token for token, _ in rows[0].top] == ids.tolist()
    assert [value for _, value in rows[0].top] == pytest.approx(values.tolist(), abs=1e-9)
    assert rows[1].top == ()
    assert sample(logits[:1].clone(), [state(Sampling())])[0].logprob is None
