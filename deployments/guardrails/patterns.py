r"""Regular expressions as people write them, for an engine whose time is linear in the text.

Python's own engine backtracks: thirty letters make ``(a+)+b`` run for minutes, and no check
tells all such patterns from the good ones. RE2 runs an automaton, whatever the pattern, and its
wheels are there for every Python and machine that we support; a time limit is not needed.

A pattern is read by Python's parser and written down again for RE2. That settles the syntax
(Python's, less what an automaton cannot do) and gives what RE2 does not tell: how long a match
can be, and a second expression for all that a match can begin with. From the latter a stream
knows which of its last characters it has to hold back, and no more. The parser is a private
module of the standard library; ``requires-python`` and the tests keep it in step.

``\d \w \s \b`` are about ASCII, as RE2 has them; ``^`` and ``$`` are the ends of lines.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import re2

_parser: Any = import_module("re._parser")

UNBOUNDED = 1 << 31
"""Widths from here on mean that there is no longest match."""
MEMORY = 64 << 20
"""Bytes that the automaton of one expression may take, its cache of states included."""
ANCHORS = {
    "AT_BEGINNING": "^",
    "AT_END": "$",
    "AT_BOUNDARY": r"\b",
    "AT_NON_BOUNDARY": r"\B",
}
CLASSES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
FLAGS = {re.IGNORECASE: "i", re.DOTALL: "s"}
"""Those that the engine has to know; the parser is done with the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    match: str
    """For RE2."""
    beginnings: str
    """For RE2: every text that a match begins with, the empty one and the whole included."""
    width: int
    """Characters of the longest match, or more than ``UNBOUNDED``."""


def read(source: str) -> Pattern:
    """Raises ValueError: what is wrong with ``source``, and what would be right."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a set that may mean something else one day
            tree = _parser.parse(source)
        flags = _letters(tree.state.flags)
        whole, beginnings = _whole(tree), _beginnings(tree)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"{source!r:.80} is not a regular expression: {error}") from None
    except Unsupported as error:
        raise ValueError(f"{source!r:.80} uses {error}") from None
    shortest, longest = tree.getwidth()
    if shortest == 0:
        raise ValueError(f"{source!r:.80} matches the empty text, which is everywhere")
    return Pattern(
        match=f"(?m{flags}:{whole})", beginnings=f"(?m{flags}:{beginnings})", width=longest
    )


def automaton(expression: str) -> Any:
    """Compiled by RE2; the longest of the leftmost matches counts.

    Raises:
        ValueError: RE2 does not take it.
    """
    options = re2.Options()
    options.longest_match = True
    options.log_errors = False
    options.max_mem = MEMORY
    try:
        return re2.compile(expression, options)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode() if isinstance(reason, bytes) else reason
        raise ValueError(f"the pattern is too large or not supported: {reason}") from None


class Unsupported(Exception):
    """Something of Python's syntax that an automaton cannot do."""


def _whole(tree: Any) -> str:
    return "".join([_item(op.name, argument) for op, argument in tree])


def _item(op: str, argument: Any) -> str:
    match op:
        case "LITERAL":
            return _character(argument)
        case "NOT_LITERAL":
            return f"[^{_character(argument)}]"
        case "ANY":
            return "."
        case "IN":
            return _set(argument)
        case "AT":
            if argument.name not in ANCHORS:
                raise Unsupported("an end of the whole text; write ^ or $, the ends of a line")
            return ANCHORS[argument.name]
        case "BRANCH":
            return _any_of([_whole(branch) for branch in argument[1]])
        case "SUBPATTERN":
            _, added, removed, inner = argument
            return _flagged(added, removed, _whole(inner))
        case "MAX_REPEAT" | "MIN_REPEAT":
            low, high, inner = argument
            return f"(?:{_whole(inner)}){_count(low, high)}"
    raise Unsupported("a look-around, a back-reference or a possessive group; say it without")


def _beginnings(tree: Any) -> str:
    """Of a sequence: a beginning of its first item, or all of that and a beginning of the rest.

    An anchor at the very end of the text as it is may hold or not once more has come. It
    need not be right there: the text before it is a beginning without it.
    """
    rest = ""
    for op, argument in reversed(list(tree)):
        whole = _item(op.name, argument)
        rest = f"(?:{_beginning(op.name, argument)}|{whole}{rest})"
    return rest


def _beginning(op: str, argument: Any) -> str:
    match op:
        case "BRANCH":
            return _any_of([_beginnings(branch) for branch in argument[1]])
        case "SUBPATTERN":
            _, added, removed, inner = argument
            return _flagged(added, removed, _beginnings(inner))
        case "MAX_REPEAT" | "MIN_REPEAT":
            _, high, inner = argument
            if high == 0:
                return ""
            before = f"(?:{_whole(inner)}){_count(0, high if _endless(high) else high - 1)}"
            return (before if high > 1 else "") + _beginnings(inner)
    return ""  # of one character: nothing


def _set(items: Any) -> str:
    parts = []
    for op, argument in items:
        match op.name:
            case "NEGATE":
                parts.append("^")
            case "LITERAL":
                parts.append(_character(argument))
            case "RANGE":
                parts.append(f"{_character(argument[0])}-{_character(argument[1])}")
            case "CATEGORY":
                parts.append(CLASSES[argument.name])
    return f"[{''.join(parts)}]"


def _character(code: int) -> str:
    character = chr(code)
    return character if character.isascii() and character.isalnum() else rf"\x{{{code:x}}}"


def _any_of(branches: list[str]) -> str:
    return f"(?:{'|'.join(branches)})"


def _flagged(added: int, removed: int, inner: str) -> str:
    off = _letters(removed)
    return f"(?{_letters(added)}{'-' + off if off else ''}:{inner})"


def _letters(flags: int) -> str:
    return "".join([letter for flag, letter in FLAGS.items() if flags & flag])


def _endless(high: int) -> bool:
    return bool(high == _parser.MAXREPEAT)


def _count(low: int, high: int) -> str:
    return f"{{{low},}}" if _endless(high) else f"{{{low},{high}}}"
