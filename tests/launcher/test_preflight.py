"""Mistakes are found before anything is started, each in one line with a remedy."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from deployments.launcher.preflight import Port, check_ports, is_free, load, owner, ports
from models.errors import ConfigError

GOOD = """
http_options: {port: 8123}
applications:
  - import_path: deployments.app:build
    args:
      models:
        vectors: {task: embed, source: ./a}
        talk: {task: generate, source: ./b}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    return path


def test_what_the_launcher_needs_is_read(config: Path) -> None:
    found = load(config)
    assert found.url == "http://localhost:8123"
    assert found.chat_model == "talk"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("task: embed", "task: embedd", "embedd"),
        ("vectors: {", "vectors: {slots: 3, ", r"models\.vectors\.embed\.slots"),
        ("applications:", "applikations:", "expected http_options and applications"),
        ("port: 8123", "port: eight", "expected http_options and applications"),
        ("http_options: {", "http_options: [", "is not YAML"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(config: Path, old: str, new: str, said: str) -> None:
    config.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        load(config)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        load(tmp_path / "none.yaml")


def test_an_application_of_another_builder_is_left_to_serve(config: Path) -> None:
    config.write_text(GOOD.replace("deployments.app:build", "other:app"))
    assert load(config).chat_model is None


def test_a_port_in_use_names_its_owner_and_the_remedy() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        number = listener.getsockname()[1]
        assert not is_free(number)
        with pytest.raises(ConfigError, match=rf"port {number} is in use by pid {os.getpid()} \("):
            check_ports(iter([Port(number=number, remedy="set PORT")]))
    assert is_free(number)


def test_all_ports_in_use_are_said_at_once() -> None:
    wanted = [Port(number=1, remedy="set A"), Port(number=2, remedy="set B")]
    with pytest.raises(ConfigError) as caught:
        check_ports(iter(wanted), is_free=lambda _: False, owner=lambda port: f"pid {port} (x)")
    assert caught.value.message.splitlines() == [
        "port 1 is in use by pid 1 (x); stop it or set A",
        "port 2 is in use by pid 2 (x); stop it or set B",
    ]


def test_an_owner_that_is_hidden_from_us_is_no_error() -> None:
    assert owner(0) == "a process of another user"


def test_haproxy_takes_more_ports(config: Path) -> None:
    plain = {port.number for port in ports(load(config), {})}
    assert plain == {8123, 8265, 9464}
    env = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_STATS_PORT": "7000"}
    assert {port.number for port in ports(load(config), env)} == plain | {9101, 7000, 8500}
