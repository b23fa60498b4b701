"""GGUF → safetensors: the same numbers, the tokenizer as trained, errors that advise."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from models import gguf
from models.errors import ConfigError, Unavailable

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def converted(llama_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    gguf.convert(llama_gguf, folder)
    return folder


def test_weights_are_the_same(converted: Path, llama: Path) -> None:
    from safetensors.numpy import load_file

    expected = load_file(llama / "model.safetensors")
    found = load_file(converted / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] == weight).all(), name


def test_transformers_loads_what_was_written(converted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 128
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("ab").input_ids == tokenizer("ab", add_special_tokens=False).input_ids


def test_a_turn_ends_with_eos_or_eot(converted: Path) -> None:
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(converted).eos_token_id == [0, 2]


def test_chat_template_is_kept(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert rendered == "<|im_start|>user\nab<|im_end|>\n"
    assert tokenizer.tokenize(rendered)[0] == "<|im_start|>"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("\n\n1", ["ĊĊ", "1"]),  # digits are split off first, so the line feeds stay together
        ("  1", ["ĠĠ", "1"]),
        ("\n\na", ["Ċ", "Ċ", "a"]),
        ("12", ["1", "2"]),
    ],
)
def test_digits_are_split_off_before_words(converted: Path, text: str, tokens: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("at_start", "error", "says"),
    [
        ("sys.modules['gguf'] = None", ConfigError, r"gguf.*pip install 'frontier-run\[gguf\]'"),
        ("os.kill(os.getpid(), 9)", Unavailable, r"killed by signal 9; if memory ran out"),
        ("os._exit(1)", ConfigError, r"llama\.gguf: .* ended with status 1 and no message"),
    ],
)
def test_a_converter_that_fails(
    at_start: str,
    error: type[Exception],
    says: str,
    llama_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys; {at_start}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(error, match=says):
        gguf.convert(llama_gguf, tmp_path / "out")


def test_a_file_that_is_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not a model, but more than 24 bytes of something")
    assert gguf.main([str(tmp_path / "a.gguf"), str(tmp_path / "out")]) == gguf.Exit.FAILED
    said = capsys.readouterr().err
    assert "a.gguf cannot be converted" in said
    assert "use a model published as safetensors" in said


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (ValueError("unknown architecture"), False),
    ],
)
def test_a_full_disk_is_told_from_a_bad_file(error: Exception, full: bool) -> None:
    assert gguf._disk_full(error) is full


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert gguf.main([]) == gguf.Exit.USAGE
    assert "FILE.gguf FOLDER" in capsys.readouterr().err
