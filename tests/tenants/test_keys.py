"""Keys: what they look like, and that only the right one fits."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.tenants.keys import Peppers, id_of, looks_like_key, mint
from models.errors import ConfigError


def peppers(*secrets: str) -> Peppers:
    return Peppers.of({"FRONTIER_KEY_SECRETS": ",".join(secrets)})


OLD, NEW = "an old secret of ours", "a new secret of ours"


def test_a_minted_key() -> None:
    one, other = mint(), mint()
    assert one.text != other.text
    assert id_of(one.text) == one.id
    assert looks_like_key(one.text)
    assert one.text not in repr(one)


@given(st.text(max_size=80))
def test_whatever_is_no_key_has_no_id(text: str) -> None:
    assert id_of(text) is None
    assert id_of(f"fr_{text}") is None


def test_only_the_whole_key_fits() -> None:
    one = mint()
    digest = peppers(NEW).digest(one.text)
    assert len(digest) == 64
    assert peppers(NEW).fits(one.text, digest)
    changed = one.text[:-1] + ("0" if one.text[-1] != "0" else "1")
    assert not peppers(NEW).fits(changed, digest)
    assert not peppers(OLD).fits(one.text, digest)


def test_a_secret_is_rotated() -> None:
    before, after = mint(), mint()
    old_digest = peppers(OLD).digest(before.text)
    both = peppers(NEW, OLD)
    assert both.fits(before.text, old_digest)
    assert both.digest(after.text) == peppers(NEW).digest(after.text)
    assert not peppers(NEW).fits(before.text, old_digest)


@pytest.mark.parametrize("given", ["short", " , ", "long enough for a secret,short"])
def test_secrets_that_are_none(given: str) -> None:
    with pytest.raises(ConfigError, match="FRONTIER_KEY_SECRETS: expected") as told:
        Peppers.of({"FRONTIER_KEY_SECRETS": given})
    assert "short" not in told.value.message


def test_without_secrets_a_private_file_is_made_once(tmp_path: Path) -> None:
    environ = {"FRONTIER_HOME": str(tmp_path / "home")}
    key = mint().text
    digest = Peppers.of(environ).digest(key)
    assert Peppers.of(environ).fits(key, digest)
    file = tmp_path / "home" / "key_secrets"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["key_secrets"]
    file.write_text("")
    with pytest.raises(ConfigError, match="key_secrets: expected"):
        Peppers.of(environ)


def test_secrets_do_not_show() -> None:
    assert OLD not in repr(peppers(OLD))
