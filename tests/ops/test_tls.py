"""The example fronts of ops/tls, as they are: real servers in front of a real gateway."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import threading
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import orjson
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.sync.client import connect

from deployments.gateway.app import create_app
from models.contracts import Delta, GenerateRequest
from tests.gateway.fakes import FakeGenerator, World
from tests.gateway.server import LiveServer, wait_until
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking
from tests.gateway.test_infer import STREAM
from tests.gateway.test_infer import asking as infer
from tests.servers import free_port

EXAMPLES = Path(__file__).parents[2] / "ops" / "tls"
NAME = "gateway.example.com"
HERE = "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    authority: Path
    chain: Path
    key: Path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority of our own, and what it says of this machine."""
    folder = tmp_path_factory.mktemp("certificates")
    roots, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an authority of the tests")])
    now = datetime.now(UTC)

    def unsigned(name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(root)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(roots.public_key()),
                critical=False,
            )
        )

    authority = (
        unsigned(root, roots)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_may_sign_certificates(), critical=True)
        .sign(roots, SHA256())
    )
    ours = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HERE)])
    certificate = (
        unsigned(ours, key)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HERE)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(roots, SHA256())
    )
    found = Certificates(
        authority=folder / "authority.pem", chain=folder / "chain.pem", key=folder / "key.pem"
    )
    found.authority.write_bytes(authority.public_bytes(Encoding.PEM))
    found.chain.write_bytes(certificate.public_bytes(Encoding.PEM))
    found.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return found


def _may_sign_certificates() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


@dataclass
class GatedGenerator(FakeGenerator):
    """Says its first piece, and no more until the gate is opened."""

    gate: threading.Event = field(default_factory=threading.Event)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        said = 0
        source = cast("AsyncGenerator[Delta]", super().generate(request))
        async with aclosing(source) as deltas:
            async for delta in deltas:
                if said == 1:
                    assert await asyncio.to_thread(self.gate.wait, 30)
                said += 1
                yield delta


@dataclass
class Seen:
    """What arrives at the gateway."""

    app: ASGIApp
    scopes: list[Scope] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            self.scopes.append(scope)
        await self.app(scope, receive, send)

    def headers(self) -> dict[str, list[str]]:
        """Of the last request."""
        found: dict[str, list[str]] = {}
        for name, value in self.scopes[-1]["headers"]:
            found.setdefault(name.decode(), []).append(value.decode())
        return found


def put(text: str, *changes: tuple[str, str]) -> str:
    """The example with this machine's particulars; each of them has to be there."""
    for example, ours in changes:
        assert example in text, f"the example has no {example!r} any more"
        text = text.replace(example, ours)
    return text


Write = Callable[[Path, int, int, int, Certificates], list[str]]
"""A front's configuration, for its two ports and the gateway's; returns its command."""


def nginx(folder: Path, http: int, https: int, gateway: int, given: Certificates) -> list[str]:
    site = put(
        (EXAMPLES / "nginx.conf").read_text(),
        ("listen 80;", f"listen 127.0.0.1:{http};"),
        ("listen 443 ssl", f"listen 127.0.0.1:{https} ssl"),
        (f"server_name {NAME};", f"server_name {HERE};"),
        ("server 127.0.0.1:8000;", f"server 127.0.0.1:{gateway};"),
        ("/etc/ssl/frontier-run/fullchain.pem", str(given.chain)),
        ("/etc/ssl/frontier-run/key.pem", str(given.key)),
    )
    (folder / "frontier-run.conf").write_text(site)
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log;\n"
        "events { worker_connections 64; }\n"
        f"http {{ access_log off; {temporary} include {folder}/frontier-run.conf; }}\n"
    )
    return ["nginx", "-p", str(folder), "-e", f"{folder}/log", "-c", f"{folder}/nginx.conf"]


def caddy(folder: Path, http: int, https: int, gateway: int, given: Certificates) -> list[str]:
    ours = (
        f"\tadmin off\n\thttp_port {http}\n\thttps_port {https}\n\tdefault_bind 127.0.0.1\n"
        "\tauto_https disable_redirects\n"
    )
    site = put(
        (EXAMPLES / "Caddyfile").read_text(),
        ("\tauto_https disable_redirects\n", ours),
        (f"http://{NAME} {{", f"http://{HERE} {{"),
        (f"https://{NAME}{{uri}}", f"https://{HERE}{{uri}}"),
        (f"\n{NAME} {{", f"\n{HERE} {{"),
        ("reverse_proxy 127.0.0.1:8000", f"reverse_proxy 127.0.0.1:{gateway}"),
        ("# tls /etc/ssl", "tls /etc/ssl"),
        ("/etc/ssl/frontier-run/fullchain.pem", str(given.chain)),
        ("/etc/ssl/frontier-run/key.pem", str(given.key)),
    )
    (folder / "Caddyfile").write_text(site)
    return ["caddy", "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]


FRONTS: dict[str, Write] = {"nginx": nginx, "caddy": caddy}


@contextmanager
def running(command: list[str], folder: Path, *ports: int) -> Iterator[None]:
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    executable = shutil.which(command[0], path=path)
    if executable is None:
        package = {"nginx": "nginx-light"}.get(command[0], command[0])
        pytest.skip(f"{command[0]} is not installed: apt-get install {package}")
    said = folder / "said"
    with said.open("wb") as output:
        process = subprocess.Popen(
            [executable, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)},
        )

    def listens() -> bool:
        assert process.poll() is None, said.read_text()
        return all(_answers(port) for port in ports)

    try:
        wait_until(listens, 20)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    kind: str
    http: int
    https: int
    trust: ssl.SSLContext
    seen: Seen
    generator: GatedGenerator

    @property
    def url(self) -> str:
        return f"https://{HERE}:{self.https}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.trust, timeout=20, **options)


@pytest.fixture(scope="module", params=FRONTS)
def front(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    certificates: Certificates,
) -> Iterator[Front]:
    generator = GatedGenerator(pieces=["first", "second", "third"])
    seen = Seen(create_app(World(generator=generator).services()))
    folder = tmp_path_factory.mktemp(request.param)
    http, https = free_port(), free_port()
    with ExitStack() as stack:
        gateway = stack.enter_context(LiveServer(seen))
        command = FRONTS[request.param](folder, http, https, gateway.port, certificates)
        stack.enter_context(running(command, folder, http, https))
        yield Front(
            kind=request.param,
            http=http,
            https=https,
            trust=ssl.create_default_context(cafile=str(certificates.authority)),
            seen=seen,
            generator=generator,
        )


@pytest.fixture
def client(front: Front) -> Iterator[httpx.Client]:
    with front.client() as client:
        yield client


def test_who_trusts_the_authority_is_answered(client: httpx.Client) -> None:
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert answer.json()["data"] == {"status": "alive"}
    assert answer.headers["strict-transport-security"] == "max-age=63072000"
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    assert not any(character.isdigit() for character in answer.headers.get("server", ""))


def test_who_does_not_is_not(front: Front) -> None:
    with httpx.Client() as client, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY"):
        client.get(front.url + "/healthz")


@pytest.mark.parametrize(
    ("version", "agreed"),
    [(ssl.TLSVersion.TLSv1_1, None), (ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (None, "TLSv1.3")],
    ids=["1.1", "1.2", "1.3"],
)
def test_versions_of_tls(
    front: Front, certificates: Certificates, version: ssl.TLSVersion | None, agreed: str | None
) -> None:
    context = ssl.create_default_context(cafile=str(certificates.authority))
    if version is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
        context.set_ciphers("DEFAULT@SECLEVEL=0")  # or we would be the ones who refuse
    with (
        socket.create_connection(("127.0.0.1", front.https), timeout=10) as raw,
        ExitStack() as stack,
    ):
        if agreed is None:
            stack.enter_context(pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"))
        with context.wrap_socket(raw, server_hostname=HERE) as secured:
            assert secured.version() == agreed


def test_plain_http_is_sent_on(front: Front) -> None:
    answer = httpx.post(f"http://{HERE}:{front.http}/v1/infer?x=1", content=b"{}")
    assert answer.status_code == 308
    target = httpx.URL(answer.headers["location"])
    assert (target.scheme, target.host) == ("https", HERE)
    assert target.raw_path == b"/v1/infer?x=1"
    assert "strict-transport-security" not in answer.headers  # which only counts over TLS


def test_plain_http_is_sent_nowhere_else(front: Front) -> None:
    answer = httpx.get(f"http://127.0.0.1:{front.http}/", headers={"host": "evil.example"})
    assert "evil.example" not in answer.headers.get("location", "")


@pytest.mark.parametrize(
    ("path", "body", "accept", "last"),
    [
        (CHAT, asking(stream=True), "text/event-stream", "data: [DONE]"),
        (STREAM, infer(), "text/event-stream", '"finish_reason"'),
        (STREAM, infer(), "application/x-ndjson", '"finish_reason"'),
    ],
    ids=["chat", "sse", "ndjson"],
)
def test_a_stream_arrives_as_it_is_made(
    front: Front, client: httpx.Client, path: str, body: dict[str, Any], accept: str, last: str
) -> None:
    front.generator.gate.clear()
    with client.stream("POST", path, json=body, headers={"accept": accept}) as answer:
        assert answer.headers["content-type"].startswith(accept)
        lines = answer.iter_lines()
        while "first" not in next(lines):
            pass
        assert front.generator.running == 1  # and waits at the gate
        front.generator.gate.set()
        assert last in [line for line in lines if line][-1]


def test_who_hangs_up_frees_what_he_held(front: Front, client: httpx.Client) -> None:
    front.generator.gate.clear()
    with client.stream("POST", CHAT, json=asking(stream=True)) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert front.generator.running == 1
    wait_until(lambda: front.generator.running == 0)
    assert len(front.generator.cancelled) == 1
    front.generator.gate.set()  # a thread of the fake waits there


def test_a_websocket(front: Front) -> None:
    front.generator.gate.clear()
    with connect(
        f"wss://{HERE}:{front.https}/v1/infer/ws", ssl=front.trust, open_timeout=20
    ) as socket:
        ask = {"type": "infer", "id": "a", "model": "smollm2", "prompt": "hi"}
        socket.send(orjson.dumps(ask).decode())
        assert orjson.loads(socket.recv(timeout=20))["data"] == {"text": "first"}
        front.generator.gate.set()
        event = "token"
        while event == "token":
            event = orjson.loads(socket.recv(timeout=20))["event"]
    assert event == "done"
    assert front.seen.scopes[-1]["scheme"] == "wss"


LIES = {
    "x-forwarded-for": "6.6.6.6",
    "x-forwarded-host": "evil.example",
    "x-forwarded-port": "6666",
    "x-forwarded-proto": "http",
    "x-real-ip": "6.6.6.6",
    "forwarded": "for=6.6.6.6;host=evil.example",
    "x-request-timeout-seconds": "0.001",
    "x-request-disconnect-disabled": "?1",
}


def test_nobody_says_of_himself_where_he_comes_from(front: Front, client: httpx.Client) -> None:
    assert client.get("/healthz", headers=LIES).status_code == 200
    scope, headers = front.seen.scopes[-1], front.seen.headers()
    assert headers["x-forwarded-for"] == headers["x-real-ip"] == ["127.0.0.1"]
    assert headers["x-forwarded-proto"] == ["https"]
    [host] = headers["x-forwarded-host"]
    assert host.partition(":")[0] == HERE
    for name in ("forwarded", "x-request-timeout-seconds", "x-request-disconnect-disabled"):
        assert name not in headers
    assert headers.get("x-forwarded-port", [str(front.https)]) == [str(front.https)]
    assert (scope["client"][0], scope["scheme"]) == ("127.0.0.1", "https")


def test_the_open_platform_s_control_plane_stays_closed(client: httpx.Client) -> None:
    answer = client.get("/admin/v1/tenants")
    assert answer.status_code == 403
    assert "this request was forwarded" in answer.json()["error"]["message"]


def raw(front: Front, target: bytes) -> bytes:
    """Head and body of an answer to a path that no client library has put right."""
    with (
        socket.create_connection(("127.0.0.1", front.https), timeout=20) as plain,
        front.trust.wrap_socket(plain, server_hostname=HERE) as secured,
    ):
        host = f"{HERE}:{front.https}".encode()
        secured.sendall(
            b"GET %b HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n\r\n" % (target, host)
        )
        answer = b""
        while piece := secured.recv(65536):
            answer += piece
    return answer


@pytest.mark.parametrize("target", [b"/v1/..%2fadmin/v1/tenants", b"/admin%2fv1%2ftenants"])
def test_an_odd_path_reaches_the_gateway_as_it_is(front: Front, target: bytes) -> None:
    answer = raw(front, target)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"INVALID_INPUT"' in answer
    assert front.seen.scopes[-1]["raw_path"] == target


def test_a_body_that_is_too_long_is_told_so_by_the_gateway(client: httpx.Client) -> None:
    answer = client.post(
        CHAT, content=b" " * 1_500_000, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    assert "1048576 are allowed" in answer.json()["error"]["message"]
