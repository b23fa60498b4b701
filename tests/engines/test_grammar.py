"""Answers that keep to a grammar, whatever the model would rather say."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from models.contracts import FinishReason, Grammar, GrammarKind, Sampling
from models.errors import InvalidInput
from tests.engines.clients import Start, Tiny, answer, greedy, idle, request, text, tokens
from tests.engines.reference import Reference
from tests.tiny_models import CONFIGS

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "c"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def schema(definition: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(definition))


def drawing(grammar: Grammar, seed: int = 0, **fields: Any) -> Sampling:
    return Sampling(**{"seed": seed, "grammar": grammar, **fields})


def ended(deltas: list[Any], index: int = 0) -> FinishReason | None:
    return next((d.finish_reason for d in deltas if d.index == index and d.finish_reason), None)


@pytest.mark.parametrize("kind", CONFIGS)
async def test_json_by_a_schema_from_a_model_that_knows_none(
    kind: str, tiny: Tiny, start: Start
) -> None:
    engine = start(tiny(kind))
    for seed in range(4):
        deltas = await answer(engine, request(sampling=drawing(schema(PERSON), seed)))
        assert ended(deltas) is FinishReason.STOP
        jsonschema.validate(json.loads(text(deltas)), PERSON)
    await idle(engine)


LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 500},
        {"type": "string", "maxLength": 5},
        {"enum": ["x", 1, None, "ü"]},
        {"const": {"k": [1]}},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
    ]
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most},
        inner,
        st.integers(0, 2),
    )
    objects = st.dictionaries(st.text('ab"\\é', max_size=3), inner, max_size=3).map(
        lambda properties: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties),
            "additionalProperties": False,
        }
    )
    return arrays | objects | st.lists(inner, min_size=1, max_size=2).map(lambda x: {"anyOf": x})


SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=5)


@pytest.fixture(scope="module")
def roomy(tiny: Tiny) -> Iterator[Engine]:
    engine = Engine("tiny", tiny("llama"), EngineConfig(slots=4, threads=1), QueueConfig())
    yield engine
    engine.close()


@given(definition=SCHEMAS, seed=st.integers(0, 2**32), temperature=st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_what_ends_is_valid_and_what_is_cut_off_had_no_room(
    definition: Any, seed: int, temperature: float, roomy: Engine
) -> None:
    async def ask() -> list[Any]:
        sampling = drawing(schema(definition), seed, temperature=temperature)
        return await answer(roomy, request(sampling=sampling))

    deltas = asyncio.run(ask())
    if ended(deltas) is FinishReason.STOP:
        jsonschema.validate(json.loads(text(deltas)), definition)
    else:
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.prompt_tokens + len(tokens(deltas)) == roomy.context


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (Grammar(GrammarKind.REGEX, r"\d{3}-\d{2}"), r"\d{3}-\d{2}"),
        (Grammar(GrammarKind.LARK, 'start: "yes" | "no"'), "yes|no"),
    ],
)
async def test_other_grammars(tiny: Tiny, start: Start, grammar: Grammar, expected: str) -> None:
    engine = start(tiny("llama"))
    sampling = drawing(grammar, logprobs=2)
    deltas = await answer(engine, request(sampling=sampling, n=3, stream=True))
    for index in range(3):
        assert re.fullmatch(expected, text(deltas, index))
        assert ended(deltas, index) is FinishReason.STOP


async def test_others_in_the_batch_do_not_notice(tiny: Tiny, start: Start) -> None:
    engine, reference = start(tiny("llama")), Reference(tiny("llama"))
    plain = request((5, 6, 7), greedy(12))
    bound = request(sampling=drawing(schema(PERSON), temperature=0.0))
    together = await asyncio.gather(*(answer(engine, each) for each in (plain, bound, plain)))
    for deltas in (together[0], together[2]):
        assert tokens(deltas) == reference.answer(plain).tokens
    assert json.loads(text(together[1])).keys() == {"name", "age", "tags"}


async def test_an_answer_that_ignores_the_end_still_ends_with_its_grammar(
    tiny: Tiny, start: Start
) -> None:
    sampling = drawing(Grammar(GrammarKind.REGEX, "ab"), ignore_eos=True)
    deltas = await answer(start(tiny("llama")), request(sampling=sampling))
    assert (text(deltas), ended(deltas)) == ("ab", FinishReason.STOP)


@pytest.mark.parametrize(
    ("grammar", "field", "problem"),
    [
        (schema({"type": "wrong"}), "response_format", "wrong"),
        (Grammar(GrammarKind.JSON_SCHEMA, "nonsense"), "response_format", "no json_schema"),
        (schema({"not": {"type": "string"}}), "response_format", "not"),
        (schema({"$ref": "https://example.com/x.json"}), "response_format", "not fetch"),
        (Grammar(GrammarKind.REGEX, "("), "structured_outputs", "regex"),
        (Grammar(GrammarKind.REGEX, "(a{1000}){1000}"), "structured_outputs", "any further"),
        (Grammar(GrammarKind.LARK, "begin: 1"), "structured_outputs", "lark"),
    ],
)
async def test_what_cannot_be_followed_is_told(
    tiny: Tiny, start: Start, grammar: Grammar, field: str, problem: str
) -> None:
    engine = start(tiny("llama"))
    with pytest.raises(InvalidInput, match=re.escape(problem)) as caught:
        await answer(engine, request(sampling=drawing(grammar)))
    assert caught.value.param == field
    await idle(engine)
    assert await answer(engine, request()), "and the engine goes on"


async def test_a_grammar_is_compiled_once(tiny: Tiny, start: Start) -> None:
    engine = start(tiny("llama"))
    asked = request(sampling=drawing(schema(PERSON)))
    first = await answer(engine, asked)
    compiled = dict(engine._grammars._compiled)
    again = await answer(engine, replace(asked, id="again"))
    assert tokens(again) == tokens(first)
    assert dict(engine._grammars._compiled) == compiled
