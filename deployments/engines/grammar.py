"""Answers that keep to a grammar: which tokens may come next (constrained decoding).

llguidance (Microsoft, MIT licence) knows the grammar; here it is asked for the tokens that a
sequence may go on with, and told which was drawn. A grammar is compiled once, beside the event
loop, and each continuation goes through a copy of its own.

JSON has no white space but one blank behind a colon or a comma: a small model that may put blanks
anywhere puts them for ever.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from deployments.engines.tools import lark
from models.contracts import Grammar, GrammarKind
from models.errors import InvalidInput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

KEPT = 64
"""Compiled grammars; clients ask for the same few again and again."""
JSON: JsonCompileOptions = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
}
LIMITS = LLParserLimits(max_lexer_states=20_000)
"""A state takes up to 2 kB; the rest is as the library has it: about 20 ms a compilation, and as
much a token."""
FIELDS = {
    GrammarKind.JSON_SCHEMA: "response_format",
    GrammarKind.REGEX: "structured_outputs",
    GrammarKind.LARK: "structured_outputs",
    GrammarKind.TOOL_CALLS: "tools",
}
"""What a client calls what it has sent."""


class Constraint:
    """Where one continuation stands in its grammar.

    Args:
        field: what the client calls the grammar.
    """

    def __init__(self, matcher: LLMatcher, field: str) -> None:
        self._matcher = matcher
        self._field = field

    def copy(self) -> Constraint:
        return Constraint(self._matcher.deep_copy(), self._field)

    @property
    def complete(self) -> bool:
        """Nothing may follow any more."""
        return bool(self._matcher.is_stopped())

    def forbid(self, row: torch.Tensor) -> None:
        """Set the logits ``row [vocabulary]`` of all tokens that may not come next to -inf."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=len(row), bitorder="little").view(np.bool_)
        row.masked_fill_(torch.from_numpy(~allowed).to(row.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Raises InvalidInput: the grammar takes more to follow than is allowed."""
        if not self._matcher.consume_token(token):  # never for the token itself: it was allowed
            raise InvalidInput(
                f"{self._field} cannot be followed any further: {_problem(self._matcher)}",
                param=self._field,
            )


class Grammars:
    """Compiles grammars for one model. Thread-safe.

    Args:
        tokenizer: the text of its tokenizer.json.
        vocabulary: tokens that the model gives logits for.
        eos: tokens with which it ends.
    """

    def __init__(self, tokenizer: Callable[[], str], vocabulary: int, eos: Collection[int]) -> None:
        self._text = tokenizer
        self._vocabulary = vocabulary
        self._eos = list(eos) or None
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, Constraint] = OrderedDict()
        self._lock = threading.Lock()

    async def compiled(self, grammar: Grammar) -> Constraint:
        """At its beginning, for the caller to copy.

        Raises:
            InvalidInput: it is none, or one that is too large; the message says why.
        """
        return await asyncio.to_thread(self._get, grammar)

    def _get(self, grammar: Grammar) -> Constraint:
        with self._lock:
            if (known := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
                return known
            if self._tokenizer is None:  # takes a second, which most models never need
                self._tokenizer = LLTokenizer(
                    self._text(), n_vocab=self._vocabulary, eos_token=self._eos
                )
        made = self._compile(grammar, self._tokenizer)
        with self._lock:
            self._compiled[grammar] = made
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return made

    def _compile(self, grammar: Grammar, tokenizer: LLTokenizer) -> Constraint:
        field = FIELDS[grammar.kind]
        try:
            text = _AS_TEXT[grammar.kind](grammar)
        except ValueError as error:
            raise InvalidInput(f"{field} is no {grammar.kind}: {error}", param=field) from None
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # much of the work, and where too much of it is noticed
        if matcher.is_error():
            raise InvalidInput(
                f"{field} cannot be followed as {grammar.kind}: {_problem(matcher)}", param=field
            )
        return Constraint(matcher, field)


def _problem(matcher: LLMatcher) -> str:
    """One line of an error that may show the whole state."""
    lines = str(matcher.get_error()).splitlines()
    named = [line.partition(": ")[2] for line in lines if line.startswith("Error: ")]
    return (named or lines)[0]


_AS_TEXT: dict[GrammarKind, Callable[[Grammar], Any]] = {
    GrammarKind.JSON_SCHEMA: lambda grammar: LLMatcher.grammar_from_json_schema(
        grammar.text, overrides=JSON
    ),
    GrammarKind.REGEX: lambda grammar: LLMatcher.grammar_from_regex(grammar.text),
    GrammarKind.LARK: lambda grammar: LLMatcher.grammar_from_lark(grammar.text),
    GrammarKind.TOOL_CALLS: lambda grammar: LLMatcher.grammar_from_lark(
        lark(grammar, cast("dict[str, object]", JSON))
    ),
}
