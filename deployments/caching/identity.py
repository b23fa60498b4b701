"""What exactly a configured model answers with, if its configuration says so. Pure.

The gateway looks answers up by it, and a replica tells it with each answer: while a new
configuration is being rolled out the two differ, and then nothing is kept. A source whose
contents may change under its name has no identity, and its answers are not cached.
"""

from __future__ import annotations

import re

from deployments.caching.keys import digest
from deployments.config import EmbedModel, GenerateModel, PredictModel
from models.errors import ConfigError
from models.sources.hub import Repository
from models.sources.registry import SCHEME
from models.sources.wheel import Wheel
from models.versions import Reference

COMMIT = re.compile(r"[0-9a-f]{40}")
CANNOT_MATTER = {"source", "sha256", "sampling", "queue", "replicas", "batcher", "threads"}
"""To an answer. (What ``sampling`` says is in each request by then.)"""


def identity(model: GenerateModel | EmbedModel) -> str | None:
    """``None``: the source may name something else tomorrow."""
    weights = _pinned(model.source, model.sha256)
    if weights is None:
        return None
    settings = model.model_dump(mode="json", exclude=CANNOT_MATTER)
    return digest({"weights": weights, "settings": settings})


def with_adapter(base: str, content_sha256: str) -> str:
    """The identity of a model that answers with an adapter of this content."""
    return digest({"base": base, "adapter": content_sha256})


def version_name(model: GenerateModel | EmbedModel | PredictModel) -> str | None:
    """For people, what ``identity`` is made of: NAME@VERSION of the registry, or the source."""
    pinned = _pinned(model.source, model.sha256)
    return None if pinned is None else pinned.removeprefix(SCHEME)


def _pinned(source: str, sha256: str | None) -> str | None:
    """A name for what never changes.

    ``sha256`` covers the weights; of a folder that is no sealed artifact, its tokenizer and
    template are taken to belong to them.
    """
    if sha256 is not None:
        return f"{source} {sha256.lower()}"
    scheme, _, rest = source.partition(":")
    try:
        match scheme:
            case "registry" if (reference := Reference.parse(rest)).number is not None:
                return f"registry:{reference}"
            case "wheel" if (wheel := Wheel.parse(rest)).version is not None:
                return str(wheel)  # a package's release is never another one later
            case "hf" if COMMIT.fullmatch((repository := Repository.parse(rest)).revision or ""):
                return str(repository)
    except ConfigError:
        pass  # whoever loads it says what is wrong with it
    return None
