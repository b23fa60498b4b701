"""Everything that can be found wrong before a process is started, each in one clear line."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deployments.config import GenerateModel, PlatformConfig, parse
from models import yaml_file
from models.errors import ConfigError

PLATFORM = "deployments.app:build"
"""The builder whose ``args`` we can judge; other applications beside it are Serve's affair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFile:
    """What the launcher needs to know of a ``serve_config.yaml``."""

    path: Path
    host: str
    port: int
    platform: PlatformConfig | None

    @property
    def url(self) -> str:
        """Where this machine reaches the gateway."""
        host = "localhost" if self.host in {"127.0.0.1", "0.0.0.0", "::"} else self.host
        return f"http://{host}:{self.port}"

    @property
    def chat_model(self) -> str | None:
        models = self.platform.models if self.platform else {}
        return next((n for n, model in models.items() if isinstance(model, GenerateModel)), None)


def load(path: Path) -> ServeFile:
    """Read and judge a configuration, without Ray.

    Raises:
        ConfigError: unreadable, not of Serve's form, or not of ours.
    """
    tree = yaml_file.read(path)
    try:
        http: dict[str, Any] = tree.get("http_options") or {}
        ours = [app for app in tree["applications"] if app["import_path"] == PLATFORM]
        return ServeFile(
            path=path,
            host=http.get("host") or "0.0.0.0",
            port=int(http.get("port") or 8000),
            platform=parse(ours[0].get("args") or {}) if ours else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}: expected http_options and applications[*].import_path, as in"
            " serve_config.yaml"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A TCP port that has to be free, and what to change if it is not."""

    number: int
    remedy: str


def ports(config: ServeFile, env: Mapping[str, str]) -> Iterator[Port]:
    """The fixed ports of a node; Ray picks the others from what is free."""
    yield Port(number=config.port, remedy=f"set http_options.port in {config.path.name}")
    names = {"FRONTIER_DASHBOARD_PORT": 8265, "FRONTIER_METRICS_PORT": 9464}
    if env.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        names |= {
            "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
            "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
        }
    for name, default in names.items():
        yield Port(number=int(env.get(name) or default), remedy=f"set {name}")


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def owner(port: int) -> str:
    """``pid 4711 (nginx)``, as far as this user may see it."""
    try:
        for found in psutil.net_connections("tcp"):
            if found.laddr and found.laddr.port == port and found.status == psutil.CONN_LISTEN:
                if found.pid is None:
                    break
                return f"pid {found.pid} ({psutil.Process(found.pid).name()})"
    except psutil.Error:
        pass
    return "a process of another user"


def check_ports(
    wanted: Iterator[Port],
    *,
    is_free: Callable[[int], bool] = is_free,
    owner: Callable[[int], str] = owner,
) -> None:
    """Raises:
    ConfigError: one line for each port in use: by whom, and what to do.
    """
    taken = [
        f"port {port.number} is in use by {owner(port.number)}; stop it or {port.remedy}"
        for port in wanted
        if not is_free(port.number)
    ]
    if taken:
        raise ConfigError("\n".join(taken))
