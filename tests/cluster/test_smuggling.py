"""Request smuggling through the proxy that stands in front of every gateway, as it is served.

``tests/attacks/test_wire.py`` says what one server makes of these bytes. Here are two. The proxy
may find two requests where the gateway would refuse the whole (it unfolds headers, and counts
lengths modulo 2**64): then both are their client's own, who could have sent them so. But nobody
who comes after it on the proxy's connections may get an answer that is not his.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from deployments.launcher.background import Served
from tests import tiny_models
from tests.attacks.test_wire import AMBIGUOUS
from tests.cluster.conftest import serving, tiny_args

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("smuggling")
    args = tiny_args(tiny_models.make("llama", folder / "base", context=512), replicas=1, slots=4)
    with serving(args, folder) as served:
        yield served


def say(served: Served, raw: bytes) -> bytes:
    """All that is answered, until the proxy hangs up or has nothing more to say."""
    address = urlsplit(served.url)
    assert address.hostname is not None
    raw = raw.replace(b"Host: x\r\n", b"Host: localhost\r\n")
    told = b""
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.settimeout(1.5)
        try:
            connection.sendall(raw)
            while data := connection.recv(65_536):
                told += data
        except (TimeoutError, ConnectionError):
            pass
    return told


def test_what_hides_in_a_body_is_nobody_elses(served: Served) -> None:
    for name, raw in AMBIGUOUS.items():
        told = say(served, raw)
        statuses = [int(part[:3]) for part in told.split(b"HTTP/1.1 ")[1:]]
        assert len(statuses) <= 2, (name, told)
        assert not any(status == 200 or status >= 500 for status in statuses), (name, told)
        for _ in range(3):  # on whichever of the connections behind the proxy
            after = httpx.get(f"{served.url}/healthz", timeout=10)
            assert after.status_code == 200, name
            assert after.json()["data"] == {"status": "alive"}, name
