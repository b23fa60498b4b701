"""Names, references, and where an alias has been."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from models.versions import (
    Action,
    Move,
    Reference,
    State,
    Version,
    check_alias,
    check_name,
    pick_previous,
    positions,
)

NOW = datetime(2026, 1, 31, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("a@3", Reference(name="a", number=3)),
        ("a@champion", Reference(name="a", alias="champion")),
        ("a@v-2", Reference(name="a", alias="v-2")),
        ("a", Reference(name="a", alias="champion")),
        ("SmolLM2.5_x-y@12", Reference(name="SmolLM2.5_x-y", number=12)),
        ("my-model_3_20260131", Reference(name="my-model", number=3)),
    ],
)
def test_references(text: str, means: Reference) -> None:
    assert Reference.parse(text) == means
    assert Reference.parse(str(means)) == means


@pytest.mark.parametrize(
    "text", ["", "@", "a@", "@1", "a@0", "a@01", "a@-1", "a@B", "a b@1", "a/b@1", "a@1@2", "a@é"]
)
def test_what_refers_to_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME@VERSION or NAME@ALIAS"):
        Reference.parse(text)


@given(st.text(max_size=8))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        found = Reference.parse(text)
    except ConfigError:
        return
    assert Reference.parse(str(found)) == found


def test_a_full_name_leads_back_to_its_version() -> None:
    version = Version(
        name="my_model",
        number=7,
        artifact="",
        uri="",
        kind="",
        size=0,
        state=State.STAGING,
        created=NOW,
        created_by="",
    )
    assert version.full_name == "my_model_7_20260131"
    assert Reference.parse(version.full_name) == Reference(name="my_model", number=7)


def test_names_and_aliases() -> None:
    assert check_name("A-b.c_d1") == "A-b.c_d1"
    assert check_alias("canary-2") == "canary-2"
    for name in ("", "-a", "a b", "a@b", "a:b", "a/b", "a_1_20260131", "a" * 101):
        with pytest.raises(ConfigError, match="cannot name a model"):
            check_name(name)
    for alias in ("", "1", "Champion", "a b", "a_b"):
        with pytest.raises(ConfigError, match="cannot be an alias"):
            check_alias(alias)


def moves(*steps: int | str) -> list[Move]:
    """Numbers promote; ``-`` removes, ``<`` rolls back."""
    made: list[Move] = []
    for revision, step in enumerate(steps, 1):
        previous = made[-1].number if made else None
        number: int | None
        match step:
            case "<":
                action, number = Action.ROLLBACK, pick_previous(made, "it")
            case "-":
                action, number = Action.REMOVE, None
            case int():
                action, number = Action.PROMOTE, step
            case _:
                raise AssertionError
        made.append(
            Move(
                name="a",
                alias="b",
                revision=revision,
                action=action,
                number=number,
                previous=previous,
                at=NOW,
                by="me",
                reason="",
            )
        )
    return made


@pytest.mark.parametrize(
    ("steps", "now"),
    [
        ((), [None]),
        ((1, 2, 3), [None, 1, 2, 3]),
        ((1, 2, 3, "<"), [None, 1, 2]),
        ((1, 2, 3, "<", "<"), [None, 1]),
        ((1, 2, "<", 3), [None, 1, 3]),
        ((1, 2, "<", 3, "<"), [None, 1]),
        ((1, "-"), [None, 1, None]),
        ((1, "-", "<"), [None, 1]),
        ((1, "<"), [None]),
    ],
)
def test_rolling_back_is_like_undo(steps: tuple[int | str, ...], now: list[int | None]) -> None:
    made = moves(*steps)
    assert positions(made) == now
    assert (made[-1].number if made else None) == now[-1]


def test_there_is_an_end_to_going_back() -> None:
    with pytest.raises(ConfigError, match="it has no earlier position"):
        moves(1, "<", "<")
