"""Every request that cannot succeed is refused with the field, what was given, what is possible."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from deployments.engines.admission import RANGES, Limits, admit, prompt_field
from models.contracts import ChatMessage, Conversation, GenerateRequest, Sampling
from models.errors import InvalidInput

LIMITS = Limits(context=32, vocabulary=100, max_choices=4)
PROMPT = (1, 2, 3)
REQUEST = GenerateRequest(id="r", model="m", prompt=PROMPT)


def refusal(request: GenerateRequest, prompt: tuple[int, ...] = PROMPT) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        admit(request, prompt, LIMITS, arrived=0.0)
    return caught.value


@pytest.mark.parametrize("field", RANGES)
@pytest.mark.parametrize("beyond", [-math.inf, math.inf, math.nan])
def test_a_parameter_out_of_range_is_named_with_its_range(field: str, beyond: float) -> None:
    error = refusal(replace(REQUEST, sampling=Sampling(**{field: beyond})))
    low, high = RANGES[field]
    assert error.param == field
    assert f"{field} is {beyond}" in error.message
    assert f"{low} to {high}" in error.message


@pytest.mark.parametrize("field", RANGES)
def test_the_ends_of_a_range_are_admitted(field: str) -> None:
    for value in RANGES[field]:
        admit(replace(REQUEST, sampling=Sampling(**{field: value})), PROMPT, LIMITS, arrived=0.0)


@pytest.mark.parametrize(
    ("sampling", "field", "possible"),
    [
        (Sampling(temperature=-0.1), "temperature", "0 to 100"),
        (Sampling(logit_bias={100: 1.0}), "logit_bias", "0 to 99"),
        (Sampling(logit_bias={-1: 1.0}), "logit_bias", "0 to 99"),
        (Sampling(logit_bias={5: math.nan}), "logit_bias", "-100.0 to 100.0"),
        (Sampling(logit_bias={5: 101.0}), "logit_bias", "token 5"),
        (Sampling(stop_token_ids=(100,)), "stop_token_ids", "0 to 99"),
        (Sampling(stop=("a", "")), "stop", "at least one character"),
        (Sampling(logprobs=21), "logprobs", "0 to 20"),
        (Sampling(logprobs=-1), "logprobs", "0 to 20"),
        (Sampling(max_tokens=0), "max_tokens", "1 to 29"),
        (Sampling(max_tokens=30), "max_tokens", "1 to 29"),
    ],
)
def test_a_refused_sampling_field(sampling: Sampling, field: str, possible: str) -> None:
    error = refusal(replace(REQUEST, sampling=sampling))
    assert error.param == field
    assert possible in error.message


@pytest.mark.parametrize("n", [0, -1, 5])
def test_the_number_of_choices(n: int) -> None:
    error = refusal(replace(REQUEST, n=n))
    assert error.param == "n"
    assert "1 to 4" in error.message


def test_logprobs_are_bounded_by_a_small_vocabulary() -> None:
    few = replace(LIMITS, vocabulary=5)
    request = replace(REQUEST, sampling=Sampling(logprobs=6))
    with pytest.raises(InvalidInput, match="0 to 5"):
        admit(request, PROMPT, few, arrived=0.0)


@pytest.mark.parametrize("prompt", [(), (100,), (1, -1), tuple([1] * 32), tuple([1] * 500)])
def test_a_refused_prompt(prompt: tuple[int, ...]) -> None:
    assert refusal(REQUEST, prompt).param == "prompt"
    conversation = Conversation((ChatMessage(role="user", content="hi"),))
    assert refusal(replace(REQUEST, prompt=conversation), prompt).param == "messages"


def test_a_prompt_too_long_says_how_long_it_may_be() -> None:
    error = refusal(REQUEST, tuple([1] * 40))
    assert "40 tokens" in error.message
    assert "31" in error.message
    assert error.details == {"prompt_tokens": 40, "context": 32}


def test_the_prompt_is_named_as_the_client_sent_it() -> None:
    assert prompt_field("text") == prompt_field((1, 2)) == prompt_field(()) == "prompt"
    assert prompt_field(Conversation((ChatMessage(role="user", content=""),))) == "messages"


def test_an_admitted_call_has_its_sequences() -> None:
    request = replace(REQUEST, n=3, timeout_s=5.0, sampling=Sampling(max_tokens=7))
    call = admit(request, PROMPT, LIMITS, arrived=10.0)
    assert (call.prompt, call.arrived, call.deadline) == (PROMPT, 10.0, 15.0)
    assert [(s.index, s.max_tokens, s.tokens) for s in call.sequences] == [
        (i, 7, [1, 2, 3]) for i in range(3)
    ]
    assert len({id(s.tokens) for s in call.sequences}) == 3, "choices grow apart"


def test_without_max_tokens_the_context_is_the_end() -> None:
    call = admit(REQUEST, PROMPT, LIMITS, arrived=0.0)
    assert call.sequences[0].max_tokens == 29
    assert call.deadline == math.inf
    whole = admit(REQUEST, tuple([1] * 31), LIMITS, arrived=0.0)
    assert whole.sequences[0].max_tokens == 1


@pytest.mark.parametrize(
    ("max_tokens", "token_cap", "length"),
    [(None, None, 29), (None, 5, 5), (None, 1000, 29), (7, 5, 7)],
)
def test_a_length_that_is_left_open(
    max_tokens: int | None, token_cap: int | None, length: int
) -> None:
    sampling = Sampling(max_tokens=max_tokens, token_cap=token_cap)
    call = admit(replace(REQUEST, sampling=sampling), PROMPT, LIMITS, arrived=0.0)
    assert [sequence.max_tokens for sequence in call.sequences] == [length]
