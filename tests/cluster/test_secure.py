"""``scripts/serve --secure`` on real Ray: keys for everything, signatures for what is loaded."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from models.artifact import Facts
from tests import tiny_models
from tests.cluster.conftest import serving, tiny_args
from tests.cluster.registered import ask, register
from tests.engines import adapters
from tests.models.test_artifact import write_key

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def test_only_with_a_key_and_only_what_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    base = tiny_models.make("llama", tmp_path / "base", context=512)
    private, public = write_key(tmp_path / "key.pem", Ed25519PrivateKey.generate())
    layers = adapters.LAYERS["llama"]
    for name, key_file in (("signed", private), ("unsigned", "")):
        monkeypatch.setenv("FRONTIER_SIGNING_KEY_FILE", key_file)
        folder = adapters.make(base, tmp_path / name, seed=1, target_modules=layers, r=4)
        register(folder, Facts(name=name, kind="causal-lm"))
    (tmp_path / "trusted.pem").write_bytes(public)
    monkeypatch.setenv("FRONTIER_TRUSTED_KEYS_FILE", str(tmp_path / "trusted.pem"))
    monkeypatch.setenv("FRONTIER_REQUIRE_SIGNATURE", "1")

    with serving(tiny_args(base, replicas=1, slots=4), tmp_path, "--secure") as platform:
        [key] = set(re.findall(r"fr_\w+", platform.output()))
        assert "Open:" not in platform.output()
        assert ask(platform, "tiny").status_code == 401
        assert ask(platform, "tiny", key[:-1] + ("a" if key[-1] != "a" else "b")).status_code == 401
        assert ask(platform, "tiny", key).status_code == 200
        assert httpx.get(f"{platform.url}/healthz", timeout=10).status_code == 200

        with httpx.Client(
            base_url=platform.url, headers={"authorization": f"Bearer {key}"}, timeout=60
        ) as http:
            route = "/admin/v1/models/tiny/adapters"
            refused = http.post(route, json={"name": "unsigned"})
            assert refused.status_code == 400, refused.text
            assert "is not signed" in refused.json()["error"]["message"]
            assert http.post(route, json={"name": "signed"}).status_code == 200
        assert ask(platform, "tiny:signed", key).status_code == 200
        assert ask(platform, "tiny:unsigned", key).status_code == 404

        port = httpx.URL(platform.url).port
        listening = {
            connection.laddr.ip
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        }
        assert listening == {"127.0.0.1"}
        assert not reachable(other_address(), port)


def other_address() -> str:
    """Of this machine, not loopback; of a test network, so that nothing is sent, if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "192.0.2.1"
        address: str = probe.getsockname()[0]
        return address


def reachable(host: str, port: int | None) -> bool:
    try:
        with socket.create_connection((host, port or 0), timeout=1):
            return True
    except OSError:
        return False
