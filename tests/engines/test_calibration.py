"""What calibration finds out is found out once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deployments.config import EngineConfig
from deployments.engines import calibration, precision
from deployments.engines.calibration import Calibration, Kept, Quality, calibrated
from deployments.engines.int8 import Int8Linear
from deployments.engines.runner import Runner

Tiny = Callable[[str], Path]
QUALITY = Quality(perplexity=1.0042, agreement=0.957)
SOME = Calibration(
    largest={"a.down": torch.rand(7), "a.up": torch.rand(3)},
    fine=frozenset({"a.down"}),
    margin=0.25,
)


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy, so that nothing is known of it."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "llama"))


def test_what_is_kept_is_known_again(folder: Path) -> None:
    assert Kept(folder, 64).read() is None
    Kept(folder, 64).write(SOME, QUALITY)
    found = Kept(folder, 64).read()
    assert found is not None
    again, quality = found
    assert quality == QUALITY
    assert (again.fine, again.margin) == (SOME.fine, SOME.margin)
    assert again.largest.keys() == SOME.largest.keys()
    assert all(torch.equal(again.largest[name], each) for name, each in SOME.largest.items())


@pytest.mark.parametrize("what", ["files", "window", "code", "spoilt"])
def test_under_other_circumstances_it_is_not(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = 64
    kept = Kept(folder, window)
    kept.write(SOME, QUALITY)
    match what:
        case "files":
            (folder / "model.safetensors").touch()
        case "window":
            window = 32
        case "code":
            monkeypatch.setattr(calibration, "CODE", calibration.CODE[:1])
        case _:
            kept._path.write_bytes(kept._path.read_bytes()[:50])
    assert Kept(folder, window).read() is None
    Kept(folder, window).write(SOME, QUALITY)
    assert Kept(folder, window).read() is not None
    assert len(list(kept._path.parent.glob(f"*{kept._path.stem}*"))) == 1


def test_a_disk_that_takes_nothing_stops_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(calibration, "default_cache", lambda: tmp_path / "file")
    Kept(folder, 64).write(SOME, QUALITY)
    assert "cannot be kept" in caplog.text
    assert Kept(folder, 64).read() is None


def test_the_second_start_reads_no_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.engines.runner.int8_units", lambda: True)
    config = EngineConfig(slots=2, dtype="auto")
    first = Runner(folder, config)
    first.close()
    monkeypatch.setattr(precision, "_judged", lambda *_: pytest.fail("calibrated again"))
    second = Runner(folder, config)
    second.close()
    one, other = (each._fused._layers[0].down for each in (first, second) if each._fused)
    assert torch.equal(one.weight, other.weight)
    assert (one.gain == other.gain).all()


def test_layers_of_a_kind_that_loses_much_take_16_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = [list(range(64))] * 2
    found = calibrated(model, windows)
    assert found is not None
    assert found.fine < found.largest.keys()
    monkeypatch.setattr(calibration, "MOST_LOST", 0.0)
    found = calibrated(model, windows)
    assert found is not None
    assert found.fine == found.largest.keys()
    layers = calibration.to_int8(model, (), found)
    assert layers
    bits = {module.bits for module in model.modules() if isinstance(module, Int8Linear)}
    assert bits == {8, 16}, "the head finds, and does not round, the largest"


def test_what_is_judged_reads_well() -> None:
    assert str(QUALITY) == "perplexity +0.42%, the same next token in 95.7%"
