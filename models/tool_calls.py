"""Tool calls as text: how every model here writes them, and how they are read.

    I look it up.
    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

This is the form of Nous Research's Hermes models, which Qwen and others are trained to. An engine
holds its model to it, so whoever reads need not guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.contracts import Grammar, GrammarKind, ToolCall

TRIGGER = "<tool_call>"
BEGIN = f'{TRIGGER}\n{{"name": '
MIDDLE = ', "arguments": '
END = "}\n</tool_call>"
BETWEEN = "\n"
NAME = "[A-Za-z0-9_-]{1,64}"
MOST_CALLS = 16
"""Of one answer: a small model that must call something may never come to an end."""

_HEAD = re.compile(rf'{re.escape(BEGIN)}"({NAME})"{re.escape(MIDDLE)}')
_LONGEST_HEAD = len(BEGIN) + 66 + len(MIDDLE)


def written(call: ToolCall) -> str:
    return f"{BEGIN}{json.dumps(call.name)}{MIDDLE}{call.arguments}{END}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What an answer may be: the calls, and the text before or in place of them."""

    tools: Mapping[str, Mapping[str, Any]]
    """The JSON schema of each one's arguments."""
    required: bool
    """It has to be calls, and nothing else."""
    parallel: bool
    """There may be more than one."""
    answer: Mapping[str, Any] | None = None
    """The JSON schema of an answer without calls; ``None``: any text."""

    def as_grammar(self) -> Grammar:
        said = {name: getattr(self, name) for name in self.__slots__}
        return Grammar(GrammarKind.TOOL_CALLS, json.dumps(said))

    @classmethod
    def of(cls, grammar: Grammar) -> Allowed:
        return cls(**json.loads(grammar.text))


@dataclass(slots=True)
class Piece:
    """What has come of one call."""

    index: int
    """Of the call in its answer, from 0."""
    name: str | None
    """With its first piece."""
    arguments: str


@dataclass(slots=True)
class Reader:
    """Takes an answer apart as it comes. How it was cut into pieces makes no difference.

    Text is kept back while it may turn out to begin a call, and blanks while one may follow.
    What is no call, for it was cut short or a guardrail has masked a part of it, is text.
    """

    calls: int = 0
    """That have begun."""
    _text: str = ""
    """Not read yet."""
    _depth: int = 0
    """Of braces: within arguments if it is not 0."""
    _quoted: bool = False
    _escaped: bool = False
    _pieces: list[Piece] = field(default_factory=list)

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[Piece]]:
        """The content and the pieces of calls, at most one a call, that have become certain."""
        self._text += text
        content = ""
        while True:
            if self._depth and not self._arguments():
                break
            head = _HEAD.search(self._text)
            if head is None:
                content += self._content(last)
                break
            if not self.calls:  # between calls there is nothing to be said
                content += self._text[: head.start()].rstrip()
            self._text = self._text[head.end() :]
            self._pieces.append(Piece(self.calls, head[1], ""))
            self.calls += 1
            self._depth = -1  # its first brace is yet to come
        pieces, self._pieces = self._pieces, []
        return content, pieces

    def _content(self, last: bool) -> str:
        """What of the text can be no part of a call."""
        at = len(self._text)
        if not last:
            at = self._text.find(TRIGGER)
            if at < 0 or len(self._text) - at > _LONGEST_HEAD:
                most = min(len(self._text), len(TRIGGER) - 1)
                held = next((n for n in range(most, 0, -1) if TRIGGER[:n] == self._text[-n:]), 0)
                at = len(self._text) - held
            at = len(self._text[:at].rstrip())
        certain, self._text = self._text[:at], self._text[at:]
        return "" if self.calls else certain

    def _arguments(self) -> bool:
        """Move on to the end of a JSON object. False: it has not come yet."""
        for at, character in enumerate(self._text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character == "{":
                self._depth = max(self._depth, 0) + 1
            elif character == "}":
                self._depth -= 1
                if self._depth == 0:
                    self._say(self._text[: at + 1])
                    self._text = self._text[at + 1 :]
                    return True
        self._say(self._text)
        self._text = ""
        return False

    def _say(self, arguments: str) -> None:
        if self._pieces:
            self._pieces[-1].arguments += arguments
        elif arguments:
            self._pieces.append(Piece(self.calls - 1, None, arguments))
