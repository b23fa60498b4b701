"""Rows → tokens and targets. Only what the model shall learn to say has a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from train.recipes.llm.rows import (
    BadRow,
    Chat,
    Completion,
    Conversation,
    Preference,
    Row,
    Text,
)

IGNORE = -100
"""The target of a token after which nothing is learned; torch's own convention."""
Tokens: TypeAlias = NDArray[np.int32]
Span: TypeAlias = tuple[int, int]
"""Characters ``begin … end`` of a text."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence that sees only itself."""

    tokens: Tokens
    targets: Tokens
    """The next token, or ``IGNORE``; as long as ``tokens``."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """Tokens with a target."""
        return int((self.targets != IGNORE).sum())


Unit: TypeAlias = tuple[Example, ...]
"""What is not torn apart: one example, or a preference's chosen and rejected one."""


def encode(row: Row, tokenizer: Any, limit: int) -> list[Unit]:
    """What one row trains on, each example of at most ``limit`` tokens.

    Documents are cut into pieces; other rows are cut off.

    Raises:
        BadRow: the chat template refuses the conversation, or nothing is left to learn.
    """
    units: list[Unit]
    match row:
        case Text(text=text):
            whole = _example([*_ids(tokenizer, text), *_end(tokenizer)], 0)
            cuts = range(0, len(whole), limit)
            pieces = [
                Example(whole.tokens[a : a + limit], whole.targets[a : a + limit]) for a in cuts
            ]
            units = [(piece,) for piece in pieces if piece.trained]
        case Completion(prompt=prompt, completion=completion):
            units = [(_continuation(tokenizer, prompt, completion, limit),)]
        case Chat(messages=messages):
            units = [(_cut(e, limit),) for e in conversation(tokenizer, messages)]
        case Preference():
            units = [_pair(tokenizer, row, limit)]
    if not units or any(not example.trained for unit in units for example in unit):
        raise BadRow(f"nothing to learn within training.sequence_length ({limit} tokens)")
    return units


def conversation(tokenizer: Any, messages: Conversation) -> list[Example]:
    """A conversation in the model's own template, with targets on its answers.

    Where an answer begins and ends is found by rendering what comes before it: nothing is
    assumed of the template. Templates that show an answer otherwise once another follows
    (they drop its reasoning) give one example an answer, each as the model would see it.
    """
    answers = [index for index, message in enumerate(messages) if message.trained]
    whole = render(tokenizer, messages)
    spans: list[Span] = []
    for index in answers:
        span = _answer_span(tokenizer, messages[: index + 1])
        if not whole.startswith(render(tokenizer, messages[: index + 1])):
            return [
                _in_spans(
                    tokenizer,
                    render(tokenizer, messages[: i + 1]),
                    [_answer_span(tokenizer, messages[: i + 1])],
                )
                for i in answers
            ]
        spans.append(span)
    return [_in_spans(tokenizer, whole, spans)]


def render(tokenizer: Any, messages: Conversation, *, ask: bool = False) -> str:
    """``ask``: with the beginning of an answer. Raises BadRow."""
    if not tokenizer.chat_template:
        raise BadRow("the model has no chat template; use prompt and completion, or text")
    plain = [
        message.model_dump(include={"role", "content", "name"}, exclude_none=True)
        for message in messages
    ]
    try:
        text: str = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # whatever Jinja and the template raise
        raise BadRow(f"the chat template refuses it: {error}") from error
    return text


def _answer_span(tokenizer: Any, messages: Conversation) -> Span:
    """Of the last message in ``render(messages)``."""
    text = render(tokenizer, messages)
    asked = render(tokenizer, messages[:-1], ask=True)
    begin = _common(text, asked)
    if begin < len(asked) and begin < len(render(tokenizer, messages[:-1])):
        raise BadRow("the chat template shows earlier messages otherwise once an answer follows")
    end = len(text)
    eos = tokenizer.eos_token
    if eos and (found := text.rfind(eos, begin)) >= 0:
        end = found + len(eos)  # what follows it is never generated
    return begin, end


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def _in_spans(tokenizer: Any, text: str, spans: Sequence[Span]) -> Example:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    begins, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    trained = np.zeros(len(ids), dtype=bool)
    for begin, end in spans:
        trained |= (ends > begin) & (begins < end)
    targets = np.full(len(ids), IGNORE, dtype=np.int32)
    targets[:-1] = np.where(trained[1:], ids[1:], IGNORE)
    return Example(ids, targets)


def _continuation(tokenizer: Any, prompt: str, completion: str, limit: int) -> Example:
    context = _ids(tokenizer, prompt)
    answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return _cut(_example([*context, *answer, *_end(tokenizer)], len(context)), limit)


def _pair(tokenizer: Any, row: Preference, limit: int) -> Unit:
    """Chosen and rejected, each after the prompt."""
    pair: list[Example] = []
    for answer in (row.chosen, row.rejected):
        if isinstance(row.prompt, str) and isinstance(answer, str):
            pair.append(_continuation(tokenizer, row.prompt, answer, limit))
        else:
            assert isinstance(row.prompt, tuple)
            assert isinstance(answer, tuple)
            context = tuple(m.model_copy(update={"weight": 0}) for m in row.prompt)
            if answer[-1].role != "assistant":
                raise BadRow("chosen and rejected must end with the assistant's message")
            pair.append(_cut(conversation(tokenizer, (*context, *answer))[-1], limit))
    return tuple(pair)


def _example(ids: Sequence[int], begin: int) -> Example:
    """With targets from token ``begin`` on; the first token is nobody's target."""
    tokens = np.asarray(ids, dtype=np.int32)
    targets = np.full(len(tokens), IGNORE, dtype=np.int32)
    first = max(begin - 1, 0)
    targets[first:-1] = tokens[first + 1 :]
    return Example(tokens, targets)


def _cut(example: Example, limit: int) -> Example:
    if len(example) <= limit:
        return example
    targets = example.targets[:limit].copy()
    return Example(example.tokens[:limit], targets)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """With what the tokenizer puts in front, and without what it puts behind."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # long ones are cut later
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
