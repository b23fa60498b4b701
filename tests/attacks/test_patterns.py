"""Regular expressions that see what clients write: none of them can be made to run for long.

Python's engine backtracks, RE2 and that of pydantic (Rust) do not. So what a configuration may
say is run by RE2, what a schema says by Rust, and what the code says by Python only where a bomb
against it does not go off.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import deployments.caching
import deployments.gateway
import deployments.guardrails
import deployments.tenants
import deployments.webhooks
from deployments.guardrails.kinds import Action
from deployments.guardrails.patterns import automaton
from deployments.guardrails.pii import RULES
from deployments.guardrails.rules import Rule
from deployments.guardrails.screen import Masker, Screen

PACKAGES = (
    deployments.caching,
    deployments.gateway,
    deployments.guardrails,
    deployments.tenants,
    deployments.webhooks,
)
BY_HAND = ("deployments.guardrails.safety.corpus", "deployments.guardrails.safety.fit")
"""Not those that no gateway runs, and whose texts are pinned by their hash."""
BEYOND = ("models.versions", "deployments.engines.lora_file")
"""Modules of other packages that read what clients write, or what it has become. (What reads the
metrics of the nodes is none: no label is whatever a client sends.)
"""
LENGTH = 100_000
"""Characters of a bomb. Linear: milliseconds. Quadratic: minutes. Exponential: never."""
PATIENCE_S = 5.0
WAYS = {
    "fullmatch": "fullmatch",
    "match": "match",
    **dict.fromkeys(("search", "sub", "split", "findall", "finditer"), "search"),
}
"""How patterns are used, and what that comes to."""
ROOT = Path(__file__).parents[2]

_parser: Any = import_module("re._parser")


def modules() -> Iterator[Any]:
    for package in PACKAGES:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name not in BY_HAND:
                yield importlib.import_module(found.name)
    for name in BEYOND:
        yield importlib.import_module(name)


def compiled(value: Any) -> Iterator[re.Pattern[Any]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from compiled(each)
    elif isinstance(value, tuple | list | set | frozenset):
        for each in value:
            yield from compiled(each)


def patterns() -> Mapping[str, re.Pattern[Any]]:
    """All of Python's, by where they are."""
    return {
        f"{module.__name__}.{name}": pattern
        for module in modules()
        for name, value in vars(module).items()
        if not name.startswith("__")
        for pattern in compiled(value)
    }


def alphabet(pattern: re.Pattern[Any]) -> list[str]:
    """A few characters that the pattern speaks of, and one of which it does not."""
    found: dict[str, None] = {}

    def visit(node: Any) -> None:
        if isinstance(node, tuple) and len(node) == 2 and str(node[0]) == "LITERAL":
            found[chr(node[1])] = None
        elif isinstance(node, tuple) and len(node) == 2 and str(node[0]) == "RANGE":
            found[chr(node[1][0])] = None
        elif isinstance(node, tuple) and len(node) == 2 and str(node[0]) == "CATEGORY":
            found[{"CATEGORY_SPACE": " ", "CATEGORY_DIGIT": "0"}.get(str(node[1]), "a")] = None
        elif isinstance(node, list | tuple) or hasattr(node, "data"):
            for each in getattr(node, "data", node):
                visit(each)

    visit(_parser.parse(pattern.pattern))
    return [*list(found)[:8], "\u00ff"]


def bombs(pattern: re.Pattern[Any]) -> Iterator[str]:
    """Long texts that match for long, and then do not."""
    letters = alphabet(pattern)
    literal = "".join(letters[:-1])
    for one in letters:
        yield one * LENGTH
        yield one * LENGTH + "\u00ff"
        yield literal + one * LENGTH + "\u00ff"
        for other in letters[:4]:
            yield (one + other) * (LENGTH // 2) + "\u00ff"
    yield literal * (LENGTH // max(1, len(literal)))


SOURCES = {
    path.relative_to(ROOT): path.read_text()
    for layer in ("state", "models", "deployments")
    for path in (ROOT / layer).glob("**/*.py")
}


def looks(name: str) -> frozenset[str]:
    """The ways in which a pattern of this name is used."""
    use = re.compile(rf"\b{name}(?:\[\w+\])?\.({'|'.join(WAYS)})\b")
    return frozenset(WAYS[way] for text in SOURCES.values() for way in use.findall(text))


@pytest.mark.parametrize("where", sorted(patterns()))
def test_no_bomb_goes_off(where: str) -> None:
    pattern = patterns()[where]
    ways = looks(where.rpartition(".")[2])
    assert ways, "how is it used? Call it by its name"
    for bomb in bombs(pattern):
        text = bomb.encode("latin-1", "replace") if isinstance(pattern.pattern, bytes) else bomb
        began = time.process_time()
        for way in ways:
            getattr(pattern, way)(text)
        took = time.process_time() - began
        assert took < PATIENCE_S, f"{bomb[:20]!r}… took {took:.1f} s"


INLINE = {
    "deployments/gateway/openapi.py": "of our own paths, when the document is made",
    "deployments/guardrails/safety/corpus.py": "of texts that are pinned by their hash, by hand",
    "deployments/guardrails/safety/fit.py": "of the same",
}
"""Where a pattern has no name, and why no client can reach it."""


def test_patterns_have_names() -> None:
    of_packages = {
        str(path): text
        for path, text in SOURCES.items()
        if ".".join(path.parts[:2]) in {package.__name__ for package in PACKAGES}
    }
    inline = re.compile(rf"\bre\.({'|'.join(WAYS)})\(")
    assert {path for path, text in of_packages.items() if inline.search(text)} == INLINE.keys()


def schemas() -> Iterator[type[BaseModel]]:
    for module in modules():
        for _, found in inspect.getmembers(module, inspect.isclass):
            if issubclass(found, BaseModel) and found.__module__ == module.__name__:
                yield found


def test_schemas_leave_patterns_to_rust() -> None:
    """pydantic's other engine is Python's."""
    checked = list(schemas())
    assert len(checked) > 50
    for schema in checked:
        assert schema.model_config.get("regex_engine", "rust-regex") == "rust-regex", schema


# Guardrails


def rules() -> Mapping[str, Rule]:
    return {
        f"{kind.value} {number}": rule
        for kind, several in RULES.items()
        for number, rule in enumerate(several)
    }


@pytest.mark.parametrize("name", sorted(rules()))
def test_personal_data_is_looked_for_by_an_automaton(name: str) -> None:
    assert type(automaton(rules()[name].expression)).__module__.partition(".")[0] == "re2"


CLOSE_TO: Mapping[str, str] = {
    "card": "4111111111111112 ",
    "card in groups": "4111-1111-1111-1112-",
    "iban": "DE89370400440532013001 ",
    "iban in groups": "DE89 3704 0044 0532 0130 01 ",
    "phone": "+49 30 1 ",
    "trunk": "0300 123456 ",
    "ip": "999.999.999.999 ",
    "ip6": "1:2:3:4:5:6:7:8:9:",
    "national": "123-45-0000 ",
    "mail": "a.b@c.",
    "mail without an end": "a@a",
    "digits": "1",
    "letters": "A",
    "blanks": " ",
    "dots": "1.",
    "colons": ":",
    "plus": "+",
    "accents": "\u00e9@",
    "pairs": "\U0001f600",
}
"""Texts that are nearly something: each find is checked, refused, and looked for again."""


@pytest.mark.parametrize("piece", CLOSE_TO.values(), ids=CLOSE_TO)
def test_a_long_prompt_is_screened_once(piece: str) -> None:
    """Work is counted, not timed: the bytes that all searches together look at grow as the text
    does, and not as its square.
    """
    short, long = work(piece, 20_000), work(piece, 80_000)
    assert long <= 4.5 * short + 1000


def work(piece: str, length: int) -> int:
    """Bytes that are looked at, with repetition, for all kinds of personal data in a text."""
    screen = Screen([(rule, Action.MASK) for several in RULES.values() for rule in several])
    counter = Counter(screen)
    Masker(screen).push((piece * (length // len(piece) + 1))[:length], last=True)
    return counter.count


class Counter:
    """Counts what the searches of a screen look at."""

    def __init__(self, screen: Screen) -> None:
        self.count = 0
        inner: Any = screen
        inner._automata = [self._counted(each) for each in inner._automata]

    def _counted(self, automaton: Any) -> Any:
        class Counting:
            def search(_, text: bytes, at: int) -> Any:
                found = automaton.search(text, at)
                self.count += (len(text) if found is None else found.end()) - at
                return found

        return Counting()
