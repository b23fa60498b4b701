"""Targets are the answers, all of them, and nothing else; whatever the template does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.recipes.llm.encoding import IGNORE, Example, conversation, encode
from train.recipes.llm.rows import BadRow, Chat, Completion, Message, Preference, Text
from train.recipes.llm.tiny import tokenizer

TOKENIZER = tokenizer()
TEMPLATES = {
    "plain": TOKENIZER.chat_template,
    # a default system message, and a line end after each message (SmolLM2)
    "default system": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<system>Be kind<eos>\n"
        "{% endif %}<{{ m.role }}>\n{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    ),
    # only the last answer keeps its reasoning (Qwen3)
    "drops reasoning": (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<eos>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    # asks for an answer with more than the answer has (DeepSeek R1)
    "opens reasoning": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    ),
}


def with_template(name: str) -> Any:
    made = tokenizer()
    made.chat_template = TEMPLATES[name]
    return made


TOKENIZERS = {name: with_template(name) for name in TEMPLATES}


def learned(example: Example) -> str:
    """The targets as text; each is the token after its place."""
    (places,) = np.nonzero(example.targets != IGNORE)
    assert (example.targets[places] == example.tokens[places + 1]).all()
    return str(TOKENIZER.decode(example.targets[places]))


def talk(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    turns = [Message(role=roles[i % 2], content=text) for i, text in enumerate(contents)]
    first = [] if system is None else [Message(role="system", content=system)]
    return (*first, *turns)


@pytest.mark.parametrize("name", ["plain", "default system"])
@given(
    contents=st.lists(st.text("ab é漢\n<>assitn", max_size=8), min_size=2, max_size=6),
    system=st.none() | st.text("sys", max_size=4),
)
def test_exactly_the_answers_are_learned(
    name: str, contents: list[str], system: str | None
) -> None:
    contents = contents[: len(contents) // 2 * 2]
    (example,) = conversation(TOKENIZERS[name], talk(*contents, system=system))
    assert learned(example) == "".join(f"{answer}<eos>" for answer in contents[1::2])


def test_an_answer_that_repeats_the_question_is_found_at_its_place() -> None:
    (example,) = conversation(TOKENIZER, talk("same", "same", "same", "other"))
    assert learned(example) == "same<eos>other<eos>"
    assert (example.targets[: len("<user>same<eos><assistant") - len("eos>")] == IGNORE).all()


def test_an_answer_of_weight_0_is_context() -> None:
    first, second, third, fourth = talk("a", "bad", "c", "good")
    muted = second.model_copy(update={"weight": 0})
    (example,) = conversation(TOKENIZER, (first, muted, third, fourth))
    assert learned(example) == "good<eos>"


def test_a_template_that_rewrites_earlier_answers_gives_one_example_each() -> None:
    chat = talk("q1", "<think>hm</think>a1", "q2", "<think>oh</think>a2")
    examples = conversation(TOKENIZERS["drops reasoning"], chat)
    assert [learned(example) for example in examples] == [
        "<think>hm</think>a1<eos>",
        "<think>oh</think>a2<eos>",
    ]
    assert TOKENIZER.decode(examples[1].tokens).startswith("<user>q1<eos><assistant>a1<eos>")


def test_a_template_that_asks_with_more_than_the_answer_has() -> None:
    (example,) = conversation(TOKENIZERS["opens reasoning"], talk("q", "a"))
    assert learned(example) == "a<eos>"
    (example,) = conversation(TOKENIZERS["opens reasoning"], talk("q", "<think>x</think>a"))
    assert learned(example) == "x</think>a<eos>"


def test_what_a_template_refuses_is_a_bad_row() -> None:
    strict = tokenizer()
    strict.chat_template = "{{ raise_exception('only tea') }}"
    with pytest.raises(BadRow, match="the chat template refuses it: only tea"):
        conversation(strict, talk("a", "b"))
    strict.chat_template = None
    with pytest.raises(BadRow, match="has no chat template"):
        conversation(strict, talk("a", "b"))


def test_a_document_is_cut_into_pieces_that_miss_no_token() -> None:
    text = "abcdefghij" * 3
    units = encode(Text(text=text), TOKENIZER, 8)
    assert [len(example) for (example,) in units] == [8, 8, 8, 7]
    assert "".join(learned_piece(unit[0]) for unit in units) == text[1:] + "<eos>"


def learned_piece(example: Example) -> str:
    """Also a target that is the first token of the next piece."""
    return str(TOKENIZER.decode(example.targets[example.targets != IGNORE]))


def test_a_completion_is_learned_and_its_prompt_is_not() -> None:
    ((example,),) = encode(Completion(prompt="2+2=", completion="4"), TOKENIZER, 64)
    assert TOKENIZER.decode(example.tokens) == "2+2=4<eos>"
    assert learned(example) == "4<eos>"


def test_rows_that_are_too_long_are_cut_off_unless_nothing_is_left() -> None:
    ((example,),) = encode(Completion(prompt="ab", completion="c" * 20), TOKENIZER, 8)
    assert len(example) == 8
    assert example.trained == 7
    with pytest.raises(BadRow, match="nothing to learn within"):
        encode(Completion(prompt="a" * 20, completion="c"), TOKENIZER, 8)


def test_a_preference_is_a_pair_after_one_prompt() -> None:
    row = Preference(prompt="q:", chosen="yes", rejected="no")
    (pair,) = encode(row, TOKENIZER, 64)
    assert [learned(example) for example in pair] == ["yes<eos>", "no<eos>"]
    said = Preference(
        prompt=talk("q", "old", "r"),
        chosen=(Message(role="assistant", content="yes"),),
        rejected=(Message(role="assistant", content="no"),),
    )
    (pair,) = encode(said, TOKENIZER, 64)
    assert [learned(example) for example in pair] == ["yes<eos>", "no<eos>"]
    assert TOKENIZER.decode(pair[1].tokens).startswith("<user>q<eos><assistant>old<eos>")


def test_a_chat_is_one_unit() -> None:
    (unit,) = encode(Chat(messages=talk("a", "b")), TOKENIZER, 64)
    assert len(unit) == 1
