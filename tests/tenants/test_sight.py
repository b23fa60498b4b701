"""Who sees which names, decided without a database."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.tenants.sight import EVERYTHING, Sight, ruled, split
from models.errors import InvalidInput
from models.versions import Reference

ACME = frozenset({"acme"})


@pytest.mark.parametrize(
    ("name", "acme", "other"),
    [
        ("free", True, True),
        ("free:anything", True, True),
        ("closed", True, False),
        ("closed:anything", True, False),
        ("nobodys", False, False),
        ("nobodys:anything", False, False),
        ("smollm2", True, True),
        ("smollm2:poet", True, False),
        ("smollm2:poet@3", True, False),
        ("smollm2:poet@champion", True, False),
        ("smollm2:poet_3_20260131", True, False),
        ("smollm2:poets", True, True),
        ("closed:others", False, False),
    ],
)
def test_a_rule_holds_for_a_name_and_all_it_means(name: str, acme: bool, other: bool) -> None:
    rules = {
        "closed": ACME,
        "nobodys": frozenset[str](),
        "smollm2:poet": ACME,
        "closed:others": frozenset({"other"}),
    }
    assert Sight(rules, "acme").sees(*split(name)) == acme
    assert Sight(rules, "other").sees(*split(name)) == other
    assert EVERYTHING.sees(*split(name))


@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    which=st.sampled_from(["", "@7", "@champion", "@candidate", "_7_20260131"]),
)
def test_no_way_to_write_a_version_gets_round_a_rule(name: str, which: str) -> None:
    """Whatever the registry would take for a version of the adapter."""
    hidden = Sight({f"smollm2:{name}": ACME}, "other")
    if Reference.parse(name + which).name == name:
        assert not hidden.sees("smollm2", name + which)


def test_rules_are_of_names_not_of_versions() -> None:
    assert ruled("smollm2", None) == "smollm2"
    assert ruled("smollm2", "poet") == "smollm2:poet"
    for adapter in ("poet@3", "poet@champion", "poet_3_20260131", "", "a b"):
        with pytest.raises(InvalidInput, match="a name of its own"):
            ruled("smollm2", adapter)
