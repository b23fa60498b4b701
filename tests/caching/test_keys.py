"""A key is the same wherever the meaning is, and another wherever the answer may be."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.caching.keys import deterministic, embedding_key, generation_key, normal
from models.contracts import (
    ChatMessage,
    Conversation,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Priority,
    Sampling,
)

SAMPLING = Sampling(temperature=0.7, seed=1, stop=("a",), logit_bias={5: 1.0, 7: -2.0})
REQUEST = GenerateRequest(id="r", model="m", prompt="hello", tenant="acme", sampling=SAMPLING)


def key(**changes: Any) -> str:
    return generation_key(replace(REQUEST, **changes), "v1")


def drawn(**changes: Any) -> str:
    return key(sampling=replace(SAMPLING, **changes))


def test_only_what_asking_again_would_repeat() -> None:
    for sampling, repeats in (
        (Sampling(), False),
        (Sampling(temperature=0), True),
        (Sampling(seed=0), True),
        (Sampling(temperature=0, seed=5), True),
        (Sampling(temperature=1e-9), False),
    ):
        assert deterministic(replace(REQUEST, sampling=sampling)) is repeats


OTHERS: dict[str, Any] = {
    "max_tokens": 7,
    "token_cap": 9,
    "temperature": 0.8,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {5: 1.0},
    "seed": 2,
    "logprobs": 0,
    "prompt_logprobs": True,
    "stop": ("b",),
    "stop_token_ids": (3,),
    "ignore_eos": True,
    "grammar": Grammar(GrammarKind.REGEX, "a"),
}


@pytest.mark.parametrize("name", [field.name for field in fields(Sampling)])
def test_every_field_of_sampling_counts(name: str) -> None:
    assert name in OTHERS, "a new field: give it another value here"
    assert drawn(**{name: OTHERS[name]}) != drawn()


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "other"},
        {"model": "n"},
        {"n": 2},
        {"prompt": "hello "},
        {"prompt": " hello"},
        {"prompt": "Hello"},
        {"prompt": (1, 2)},
        {"prompt": Conversation((ChatMessage(role="user", content="hello"),))},
        {"prompt": ()},
    ],
    ids=repr,
)
def test_all_else_that_an_answer_depends_on_counts(changes: dict[str, Any]) -> None:
    assert key(**changes) != key()


def test_the_version_counts() -> None:
    assert generation_key(REQUEST, "v2") != key()


def test_how_it_is_called_sent_and_queued_does_not() -> None:
    # The adapter is part of the version; its alias may mean another tomorrow.
    changes = {
        "id": "other",
        "stream": True,
        "priority": Priority.VIP,
        "timeout_s": 3.0,
        "weight": 2,
        "adapter": "poet@champion",
        "max_prompt_tokens": 7,
        "receipt": "r",
        "tell_place": True,
    }
    untouched = {"model", "prompt", "sampling", "n", "tenant"}
    assert {field.name for field in fields(GenerateRequest)} == changes.keys() | untouched
    assert key(**changes) == key()


def test_the_form_of_a_number_does_not() -> None:
    assert drawn(temperature=0.1 + 0.2) == drawn(temperature=0.3)
    assert drawn(top_p=1) == drawn(top_p=1.0)
    assert drawn(presence_penalty=-0.0) == drawn(presence_penalty=0.0)
    assert drawn(logit_bias={7: -2, 5: 1}) == drawn()
    assert drawn(temperature=0.3000001) != drawn(temperature=0.3)
    assert drawn(temperature=1e-12) != drawn(temperature=0)


def test_conversations_are_told_apart() -> None:
    def said(*messages: tuple[str, str]) -> str:
        return key(prompt=Conversation(tuple(ChatMessage(role=r, content=c) for r, c in messages)))

    talks = [
        said(("user", "a")),
        said(("system", "a")),
        said(("user", "a"), ("user", "")),
        said(("user", ""), ("user", "a")),
    ]
    assert len(set(talks)) == len(talks)


def test_half_a_surrogate_pair_has_a_key() -> None:
    assert key(prompt="\ud83d") != key(prompt="\ud83e")


def test_embeddings() -> None:
    facts = {"tenant": "acme", "model": "m", "version": "v"}
    keys = {embedding_key("a", **facts), embedding_key("a ", **facts)}
    for name in facts:
        keys.add(embedding_key("a", **{**facts, name: "other"}))
    assert len(keys) == 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_normal_form_is_normal(value: Any) -> None:
    assert normal(normal(value)) == normal(value)


@given(st.lists(st.tuples(st.integers(0, 99), st.floats(-100, 100)), unique_by=lambda p: p[0]))
def test_the_order_of_keys_does_not_count(pairs: list[tuple[int, float]]) -> None:
    assert drawn(logit_bias=dict(pairs)) == drawn(logit_bias=dict(reversed(pairs)))


@given(st.text(), st.text())
def test_other_prompts_have_other_keys(one: str, other: str) -> None:
    assert (key(prompt=one) == key(prompt=other)) == (one == other)


def test_what_json_has_not_is_refused() -> None:
    with pytest.raises(TypeError, match="set has no place"):
        normal({"a": {1, 2}})
