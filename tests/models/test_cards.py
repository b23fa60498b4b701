"""Cards say what the manifest says, and nothing that breaks a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from models.artifact import Data, Manifest
from models.cards import data_card, licences, model_card
from tests.models.artifacts import make


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make(tmp_path / "artifact", parents=("f" * 64,))


def test_a_model_card_holds_the_facts(manifest: Manifest) -> None:
    card = model_card(manifest)
    for fact in (
        "# digits-cnn\n",
        "| Licence | Apache-2.0 |",
        f"| Content SHA-256 | `{manifest.content_sha256}` |",
        "| Size | 108 bytes in 2 files |",
        "| Recipe | vision |",
        "| Code | c0ffee1 |",
        f"- `{'f' * 64}`",
        "Digits-5k",
        "| accuracy | 0.962 | >= 0.955 (logistic) | passed |",
        "| `net.width` | 32 |",
        f"| `weights.safetensors` | 100 | `{manifest.files['weights.safetensors'].sha256}` |",
    ):
        assert fact in card


def test_a_data_card_holds_the_facts(manifest: Manifest) -> None:
    card = data_card(manifest)
    assert card.startswith("# Data of digits-cnn\n\nDigits-5k\n")
    assert f"| SHA-256 | `{'d' * 64}` |" in card
    assert "| Licence | CC-BY-SA-3.0 |" in card


def test_what_is_unknown_is_called_so(manifest: Manifest) -> None:
    bare = replace(
        manifest, run=None, data=Data(), licence="", gates=(), metrics={}, config={}, parents=()
    )
    card = model_card(bare)
    assert "| Licence | unknown |" in card
    assert "Unknown: the manifest names no run." in card
    assert "No gates." in card
    assert "does not describe it" in data_card(bare)


def test_nothing_in_a_manifest_breaks_a_table(manifest: Manifest) -> None:
    hostile = replace(
        manifest, licence="a | b\n\n# Heading", metrics={"<script>": 1.0, "x|y": None}
    )
    card = model_card(hostile)
    assert "| Licence | a \\| b # Heading |" in card
    assert "| &lt;script> | 1 |" in card
    assert "| x\\|y | missing |" in card
    assert "\n# Heading" not in card


def test_the_licence_inventory(manifest: Manifest) -> None:
    bare = replace(manifest, licence="", data=Data())
    found = licences([("a@1", manifest), ("b@1", bare)])
    assert [(each.version, each.model, each.data) for each in found] == [
        ("a@1", "Apache-2.0", "CC-BY-SA-3.0"),
        ("b@1", "unknown", "unknown"),
    ]
