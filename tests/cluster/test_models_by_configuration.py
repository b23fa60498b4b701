"""Any local Hugging Face folder is served by an entry in the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments.launcher.background import Served
from models.contracts import GenerateRequest, Sampling
from tests import tiny_models
from tests.cluster.conftest import serving
from tests.engines.reference import Reference

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

KINDS = ("gpt2", "llama", "qwen2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_models.make(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def platform(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    models = {
        kind: {
            "task": "generate",
            "source": str(folder),
            "engine": {"slots": 4, "dtype": "float64"},
            "replicas": {"cpus": 0},
        }
        for kind, folder in folders.items()
    }
    with serving({"models": models}, tmp_path_factory.mktemp("three")) as platform:
        yield platform


@pytest.mark.parametrize("kind", KINDS)
def test_served_tokens_are_those_of_generate(
    platform: Served, folders: dict[str, Path], kind: str
) -> None:
    prompt = [72, 101, 108, 108, 111]
    sampling = Sampling(temperature=0, max_tokens=20)
    request = GenerateRequest(id="r", model=kind, prompt=tuple(prompt), sampling=sampling)
    expected = Reference(folders[kind]).answer(request)
    body = {"model": kind, "prompt": prompt, "max_tokens": 20, "temperature": 0}
    answer = httpx.post(f"{platform.url}/v1/completions", json=body, timeout=30).json()
    assert answer["choices"][0]["text"] == expected.text
    assert answer["choices"][0]["finish_reason"] == expected.finish_reason
    assert answer["usage"]["completion_tokens"] == len(expected.tokens)
