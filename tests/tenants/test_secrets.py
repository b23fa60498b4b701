"""Secrets come out of the environment or a file, and are told to nobody."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from deployments.tenants.keys import Peppers
from deployments.tenants.secrets import SecretFile, of_variable, parsed, referred
from models.errors import ConfigError

OLD, NEW = "old-secret-of-16-or-more", "new-secret-of-16-or-more"


def test_a_variable_holds_several_newest_first() -> None:
    environ = {"NAME": f" {NEW}, {OLD} ,"}
    assert referred("${NAME}", environ)() == (NEW.encode(), OLD.encode())


def test_a_variable_that_is_empty_is_none() -> None:
    assert of_variable("NAME", {"NAME": ""}) is None
    assert of_variable("NAME", {}) is None


@pytest.mark.parametrize(
    ("reference", "environ", "words"),
    [
        ("${NAME}", {}, "NAME is not set"),
        ("${NAME}", {"NAME": "hidden"}, "NAME: expected secrets of 16"),
        ("${NAME}", {"NAME": f"{NEW},hidden"}, "NAME: expected secrets of 16"),
        ("${NAME}", {"NAME": " , "}, "NAME: expected secrets of 16"),
        ("file:/nowhere/hidden-not", {}, "/nowhere/hidden-not: No such file"),
        ("hidden-and-long-enough-to-be-one", {}, r"expected \$\{NAME\}"),
        ("${hidden and no name}", {}, r"expected \$\{NAME\}"),
        ("file:hidden", {}, "file:/ABSOLUTE/PATH"),
    ],
)
def test_what_cannot_be_used_is_said_without_it(
    reference: str, environ: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        referred(reference, environ)
    assert "hidden" not in refusal.value.message.replace("hidden-not", "")


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_text(f"{OLD}\n")
    current = referred(f"file:{path}")
    assert current() == (OLD.encode(),)
    path.write_text(f"{NEW}\n\n{OLD}\n")
    assert current() == (NEW.encode(), OLD.encode())
    other = tmp_path / "other"
    other.write_text(f"{NEW}\n")
    other.replace(path)
    assert current() == (NEW.encode(),)


def test_a_file_that_gets_worse_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "secrets"
    path.write_text(OLD)
    current = SecretFile(path)
    path.write_text("hidden")
    assert current() == current() == (OLD.encode(),)
    path.write_bytes(b"\xffhidden-and-long-enough")
    assert current() == (OLD.encode(),)
    path.unlink()
    assert current() == current() == (OLD.encode(),)
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3
    assert all(str(path) in record.getMessage() for record in caplog.records)
    assert "hidden" not in caplog.text
    path.write_text(NEW)
    assert current() == (NEW.encode(),)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_bytes(b"\xffhidden-and-long-enough")
    with pytest.raises(ConfigError, match="not UTF-8") as refusal:
        SecretFile(path)
    assert "hidden" not in refusal.value.message


def test_the_secrets_of_keys_are_read_by_the_same_rules(tmp_path: Path) -> None:
    given = Peppers.of({"FRONTIER_KEY_SECRETS": f"{NEW},{OLD}"})
    (tmp_path / "key_secrets").write_text(f"{NEW}\n{OLD}\n")
    read = Peppers.of({"FRONTIER_HOME": str(tmp_path)})
    assert read.fits("fr_x", given.digest("fr_x"))
    assert read.fits("fr_x", Peppers.of({"FRONTIER_KEY_SECRETS": OLD}).digest("fr_x"))
    assert NEW not in repr(given)
    with pytest.raises(ConfigError, match="FRONTIER_KEY_SECRETS: expected"):
        Peppers.of({"FRONTIER_KEY_SECRETS": "short"})


def test_the_secrets_of_keys_are_made_once(tmp_path: Path) -> None:
    environ = {"FRONTIER_HOME": str(tmp_path / "home")}
    first = Peppers.of(environ)
    assert Peppers.of(environ).fits("fr_x", first.digest("fr_x"))
    assert os.stat(tmp_path / "home" / "key_secrets").st_mode & 0o077 == 0


def test_at_least_one() -> None:
    with pytest.raises(ConfigError, match="here: expected"):
        parsed([], "here")
