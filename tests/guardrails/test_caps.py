from __future__ import annotations

import pytest

from deployments.guardrails.caps import Caps
from models.contracts import Sampling
from models.errors import InvalidInput

FREE = Caps(plan="free", max_new_tokens=100, max_temperature=0.8)
DEFAULT = Sampling(max_tokens=500, temperature=1.0)


def test_without_caps_nothing_changes() -> None:
    asked = Sampling(max_tokens=10**6, temperature=2.0)
    assert Caps().hold(asked, Sampling()) == asked


def test_what_is_within() -> None:
    asked = Sampling(max_tokens=100, temperature=0.8)
    assert FREE.hold(asked, DEFAULT) == asked


def test_what_is_left_open_is_held_to_the_caps() -> None:
    held = FREE.hold(DEFAULT, DEFAULT)
    assert (held.max_tokens, held.temperature) == (100, 0.8)
    held = FREE.hold(Sampling(), Sampling())
    assert (held.max_tokens, held.token_cap, held.temperature) == (None, 100, 0.8)


@pytest.mark.parametrize(
    ("asked", "param", "guardrail", "words"),
    [
        (Sampling(max_tokens=101, temperature=0), "max_tokens", "max_new_tokens", "is 101"),
        (Sampling(max_tokens=1, temperature=0.9), "temperature", "max_temperature", "is 0.9"),
    ],
)
def test_what_is_asked_beyond_is_refused(
    asked: Sampling, param: str, guardrail: str, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words) as refused:
        FREE.hold(asked, DEFAULT)
    assert refused.value.param == param
    assert refused.value.details["guardrail"] == guardrail
    assert refused.value.details["category"] == "free"
