"""Encrypted artifacts: what went in comes out, or nothing does and the reason is told."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import artifact, encryption
from models.__main__ import main
from models.encryption import (
    CHUNK_BYTES,
    HEADER_BYTES,
    SUFFIX,
    TAG_BYTES,
    VARIABLE,
    VARIABLE_FILE,
    Keyring,
    Subject,
)
from models.errors import ConfigError
from models.store import Store, fetch
from tests.models.artifacts import NO_KEYS, make

OLD, NEW = "0f" * 32, "a1" * 32
OPEN = Keyring()
SMALL = 16
"""Bytes of a chunk where tests want many."""


def ring(*keys: str) -> Keyring:
    return Keyring.of({VARIABLE: ",".join(keys)})


def subject(size: int, artifact: str = "f" * 64, path: str = "weights.safetensors") -> Subject:
    return Subject(artifact=artifact, path=path, size=size)


def encrypted(plain: bytes, keys: Keyring, of: Subject | None = None) -> bytes:
    target = io.BytesIO()
    keys.encrypt(io.BytesIO(plain), target, of or subject(len(plain)))
    return target.getvalue()


def decrypted(sealed: bytes, keys: Keyring, of: Subject) -> bytes:
    target = io.BytesIO()
    keys.decrypt(io.BytesIO(sealed), target, of, "it")
    return target.getvalue()


@contextmanager
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encryption, "CHUNK_BYTES", SMALL)
        yield


# The format


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES]
)
def test_there_and_back(size: int) -> None:
    plain = os.urandom(size)
    sealed = encrypted(plain, ring(NEW))
    assert len(sealed) == subject(size).stored_size
    assert decrypted(sealed, ring(NEW), subject(size)) == plain
    assert size < 8 or plain[:64] not in sealed


@given(st.binary(max_size=5 * SMALL))
def test_there_and_back_in_many_chunks(plain: bytes) -> None:
    with small_chunks():
        sealed = encrypted(plain, ring(NEW))
        assert len(sealed) == subject(len(plain)).stored_size
        assert decrypted(sealed, ring(OLD, NEW), subject(len(plain))) == plain


def test_the_format_is_what_the_document_says() -> None:
    """Written out once more, so that what lies in stores stays readable."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    plain = bytes(range(256)) * 4097  # one chunk of 1 MiB, and 256 bytes
    sealed = encrypted(plain, ring(NEW), subject(len(plain), "e" * 64, "a/b"))
    magic, id_, salt = sealed[:8], sealed[8:16], sealed[16:48]
    key = bytes.fromhex(NEW)
    assert magic == b"FRNTAES1"
    assert id_ == hashlib.sha256(b"frontier-run artifact file key id\0" + key).digest()[:8]
    info = b"frontier-run artifact file"
    cipher = AESGCM(HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(key))
    bound = sealed[:48] + b"e" * 64 + b"\0a/b\0" + str(len(plain)).encode()
    end = 48 + (1 << 20) + 16
    first = cipher.decrypt(b"\0" * 12, sealed[48:end], bound)
    second = cipher.decrypt(b"\0" * 10 + b"\1\1", sealed[end:], bound)
    assert first + second == plain


def test_the_same_file_twice_is_not_the_same() -> None:
    one, other = (encrypted(b"a" * 100, ring(NEW)) for _ in range(2))
    assert one[:16] == other[:16]
    assert one[16:] != other[16:]


Damage = Callable[[bytes, int, int], bytes]
"""Of an encrypted file, at two places in it."""
DAMAGES: dict[str, Damage] = {
    "flipped": lambda it, at, bit: it[:at] + bytes([it[at] ^ 1 << bit % 8]) + it[at + 1 :],
    "cut": lambda it, at, _: it[:at],
    "lengthened": lambda it, at, _: it + it[-(1 + at % 64) :],
    "left out": lambda it, at, _: b"".join(_without(chunks_of(it), at)),
    "repeated": lambda it, at, _: b"".join(_repeated(chunks_of(it), at)),
    "swapped": lambda it, at, other: b"".join(_swapped(chunks_of(it), at, other)),
}


def chunks_of(sealed: bytes) -> list[bytes]:
    """The header, and then the chunks with their tags."""
    size = SMALL + TAG_BYTES
    body = sealed[HEADER_BYTES:]
    return [sealed[:HEADER_BYTES], *(body[at : at + size] for at in range(0, len(body), size))]


def _without(parts: list[bytes], at: int) -> list[bytes]:
    at = 1 + at % (len(parts) - 1)
    return parts[:at] + parts[at + 1 :]


def _repeated(parts: list[bytes], at: int) -> list[bytes]:
    at = 1 + at % (len(parts) - 1)
    return parts[: at + 1] + parts[at:]


def _swapped(parts: list[bytes], at: int, other: int) -> list[bytes]:
    at, other = 1 + at % (len(parts) - 1), 1 + other % (len(parts) - 1)
    parts[at], parts[other] = parts[other], parts[at]
    return parts


@pytest.mark.parametrize("damage", DAMAGES)
@given(plain=st.binary(max_size=4 * SMALL), at=st.integers(0, 10_000), other=st.integers(0, 10_000))
def test_whatever_is_done_to_it_is_noticed(damage: str, plain: bytes, at: int, other: int) -> None:
    with small_chunks():
        sealed = encrypted(plain, ring(NEW))
        changed = DAMAGES[damage](sealed, at % len(sealed), other)
        if changed == sealed:  # a chunk was swapped with itself
            return
        target = io.BytesIO()
        with pytest.raises(ConfigError, match=r"^it: weights\.safetensors\.aes "):
            ring(NEW).decrypt(io.BytesIO(changed), target, subject(len(plain)), "it")
        assert plain.startswith(target.getvalue())  # what was written was right


@pytest.mark.parametrize(
    "other",
    [
        subject(100, "e" * 64),
        subject(100, path="other.safetensors"),
        subject(99),
        subject(101),
    ],
    ids=["another artifact", "another file", "less", "more"],
)
def test_it_decrypts_as_nothing_else(other: Subject) -> None:
    sealed = encrypted(b"a" * 100, ring(NEW))
    with pytest.raises(ConfigError, match=r"does not decrypt|is cut short"):
        decrypted(sealed, ring(NEW), other)


def test_files_that_are_swapped() -> None:
    one, other = subject(100, path="one"), subject(100, path="other")
    sealed = encrypted(b"1" * 100, ring(NEW), one), encrypted(b"2" * 100, ring(NEW), other)
    with pytest.raises(ConfigError, match=r"one\.aes does not decrypt \(chunk 0\)"):
        decrypted(sealed[1], ring(NEW), one)


class Watched(io.BytesIO):
    most = 0

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0, "all of it was asked for"
        self.most = max(self.most, size)
        return super().read(min(size, 10_000))  # as a socket may


def test_a_large_file_is_read_in_pieces() -> None:
    plain = os.urandom(3 * CHUNK_BYTES + 5)
    source, target = Watched(plain), io.BytesIO()
    ring(NEW).encrypt(source, target, subject(len(plain)))
    assert source.most == CHUNK_BYTES
    sealed, back = Watched(target.getvalue()), io.BytesIO()
    ring(NEW).decrypt(sealed, back, subject(len(plain)), "it")
    assert sealed.most == CHUNK_BYTES + TAG_BYTES
    assert back.getvalue() == plain


def test_a_file_that_shrinks_meanwhile() -> None:
    with pytest.raises(ConfigError, match="was cut short while"):
        encrypted(b"a" * 9, ring(NEW), subject(10))


# Keys


def test_keys_of_the_environment_and_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# newest first\n{NEW}\n\n {OLD.upper()} \n")
    assert Keyring.of({VARIABLE_FILE: str(file)}) == ring(NEW, OLD)
    assert Keyring.of({}) == Keyring.of({VARIABLE: "", VARIABLE_FILE: ""}) == OPEN
    assert OPEN.newest is None
    assert ring(NEW, OLD).newest == ring(NEW).newest != ring(OLD).newest
    assert NEW not in repr(ring(NEW))
    assert repr(bytes.fromhex(NEW)) not in repr(ring(NEW))


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({VARIABLE: "hush"}, f"{VARIABLE}: expected keys of 64 hexadecimal digits"),
        ({VARIABLE: f"{NEW},hush"}, "expected keys of 64 hexadecimal digits"),
        ({VARIABLE: ","}, "expected keys"),
        ({VARIABLE: NEW + "00"}, "expected keys"),
        ({VARIABLE_FILE: "/nowhere"}, f"{VARIABLE_FILE}: /nowhere cannot be read"),
        ({VARIABLE: NEW, VARIABLE_FILE: "/nowhere"}, "are both set"),
    ],
)
def test_keys_that_are_none(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        Keyring.of(environment)
    assert "hush" not in str(raised.value)
    assert NEW not in str(raised.value)


def test_both_keys_are_valid_during_a_rotation() -> None:
    for key in (OLD, NEW):
        assert decrypted(encrypted(b"a", ring(key)), ring(NEW, OLD), subject(1)) == b"a"
    assert encrypted(b"a", ring(NEW, OLD))[8:16].hex() == ring(NEW).newest


@pytest.mark.parametrize(
    ("keys", "says"), [(ring(OLD), f"known here: {ring(OLD).newest}"), (OPEN, "there is none here")]
)
def test_a_key_that_is_not_here_is_named(keys: Keyring, says: str) -> None:
    with pytest.raises(ConfigError, match=f"under the key {ring(NEW).newest}; {says}. Add it to"):
        decrypted(encrypted(b"a", ring(NEW)), keys, subject(1))


def test_without_a_key_nothing_is_encrypted() -> None:
    with pytest.raises(ConfigError, match="nothing to encrypt"):
        encrypted(b"a", OPEN)


# In a store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FRONTIER_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def holds(store: Store, sha256: str) -> dict[str, bytes]:
    place = f"{store._root}/{sha256}"
    return {path: store._fs.cat_file(f"{place}/{path}") for path in store._held(sha256)}


def put(store: Store, sha256: str, path: str, content: bytes) -> None:
    store._fs.pipe_file(f"{store._root}/{sha256}/{path}", content)


WEIGHTS, WORDS = "weights.safetensors", "tokenizer/vocabulary.json"


def test_an_encrypted_artifact(store: Store, folder: Path, root: Path) -> None:
    manifest = make(folder)
    uri = store.publish(folder, ring=ring(NEW))
    held = holds(store, manifest.content_sha256)
    assert held.keys() == {artifact.MANIFEST, artifact.CARD, WEIGHTS + SUFFIX, WORDS + SUFFIX}
    assert not [path for path, content in held.items() if b"1" * 100 in content]
    assert store.has(manifest)
    assert store.encrypted_under(manifest.content_sha256) == {ring(NEW).newest}
    for _ in range(2):  # the second time from the cache
        back = store.fetch(manifest.content_sha256, cache=root, ring=ring(NEW))
        assert back.is_relative_to(root)
        assert artifact.verify(back, keys=NO_KEYS) == manifest
        assert (back / WORDS).read_text() == '{"a": 0}'
    assert uri == store.uri(manifest.content_sha256)  # as if it were not encrypted


def test_its_signature_is_that_of_what_was_encrypted(
    store: Store, folder: Path, root: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from models.signing import Keys

    signer = Ed25519PrivateKey.generate()
    keys = Keys(signing=signer, trusted=(signer.public_key(),), required=True)
    sha256 = make(folder, keys=keys).content_sha256
    store.publish(folder, keys=keys, ring=ring(OLD))
    store.encrypt(sha256, keys=keys, ring=ring(NEW, OLD))
    back = store.fetch(sha256, cache=root, keys=keys, ring=ring(NEW))
    artifact.verify(back, keys=keys)


def test_publishing_again_writes_nothing(store: Store, folder: Path) -> None:
    sha256 = make(folder).content_sha256
    store.publish(folder, ring=ring(NEW))
    before = holds(store, sha256)
    store.publish(folder, ring=ring(NEW, OLD))
    assert holds(store, sha256) == before
    store.publish(folder, ring=OPEN)  # it is here already
    assert holds(store, sha256) == before


@pytest.mark.parametrize("keys", [ring(OLD), OPEN], ids=["wrong", "none"])
def test_without_its_key_nothing_is_fetched(
    store: Store, folder: Path, root: Path, keys: Keyring
) -> None:
    sha256 = make(folder).content_sha256
    store.publish(folder, ring=ring(NEW))
    with pytest.raises(ConfigError, match=f"is encrypted under the key {ring(NEW).newest}"):
        store.fetch(sha256, cache=root, ring=keys)
    assert not list(root.rglob("*.json"))
    assert not list(root.rglob("*.safetensors"))


def _flip(content: bytes) -> bytes:
    return content[:60] + bytes([content[60] ^ 1]) + content[61:]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: {WEIGHTS: _flip(held[WEIGHTS + SUFFIX])}, "does not decrypt"),
        (lambda held: {WEIGHTS: held[WEIGHTS + SUFFIX][:-1]}, "is cut short"),
        (lambda held: {WEIGHTS: held[WEIGHTS + SUFFIX][:48]}, "is cut short"),
        (lambda held: {WEIGHTS: held[WEIGHTS + SUFFIX] + b"0"}, "goes on after its end"),
        (lambda held: {WEIGHTS: b"1" * 100}, "is no encrypted file"),
        (
            lambda held: {WEIGHTS: held[WORDS + SUFFIX], WORDS: held[WEIGHTS + SUFFIX]},
            "is cut|does",
        ),
    ],
    ids=["flipped", "cut", "emptied", "lengthened", "replaced", "swapped"],
)
def test_what_was_tampered_with_is_not_loaded(
    store: Store,
    folder: Path,
    root: Path,
    change: Callable[[dict[str, bytes]], dict[str, bytes]],
    says: str,
) -> None:
    sha256 = make(folder).content_sha256
    store.publish(folder, ring=ring(NEW))
    for path, content in change(holds(store, sha256)).items():
        put(store, sha256, path + SUFFIX, content)
    with pytest.raises(ConfigError, match=says):
        store.fetch(sha256, cache=root, ring=ring(NEW))
    assert not list(root.rglob("*.safetensors"))


def test_files_of_two_artifacts_that_are_swapped(store: Store, tmp_path: Path, root: Path) -> None:
    """Of the same name, size and key: only the artifact differs."""
    one, other = (make(tmp_path / text, text).content_sha256 for text in "12")
    for text in "12":
        store.publish(tmp_path / text, ring=ring(NEW))
    put(store, one, WEIGHTS + SUFFIX, holds(store, other)[WEIGHTS + SUFFIX])
    with pytest.raises(ConfigError, match="does not decrypt"):
        store.fetch(one, cache=root, ring=ring(NEW))


def test_a_file_put_there_unencrypted_is_held_to_the_manifest(
    store: Store, folder: Path, root: Path
) -> None:
    sha256 = make(folder).content_sha256
    store.publish(folder, ring=ring(NEW))
    store._fs.rm_file(f"{store._root}/{sha256}/{WEIGHTS}{SUFFIX}")
    put(store, sha256, WEIGHTS, b"2" * 100)
    with pytest.raises(ConfigError, match="is damaged or was changed"):
        store.fetch(sha256, cache=root, ring=ring(NEW))


def test_from_open_to_encrypted_to_another_key(store: Store, folder: Path, root: Path) -> None:
    manifest = make(folder)
    sha256 = manifest.content_sha256
    store.publish(folder, ring=OPEN)
    assert store.encrypted_under(sha256) == {None}
    store.encrypt(sha256, ring=ring(OLD))
    assert store.encrypted_under(sha256) == {ring(OLD).newest}
    assert WEIGHTS not in holds(store, sha256)
    store.encrypt(sha256, ring=ring(NEW, OLD))
    assert store.encrypted_under(sha256) == {ring(NEW).newest}
    back = store.fetch(sha256, cache=root, ring=ring(NEW))
    assert artifact.verify(back, keys=NO_KEYS) == manifest


def test_of_an_encryption_that_was_cut_off_both_copies_are_good(
    store: Store, folder: Path, root: Path
) -> None:
    manifest = make(folder)
    sha256 = manifest.content_sha256
    store.publish(folder, ring=ring(NEW))
    put(store, sha256, WEIGHTS, (folder / WEIGHTS).read_bytes())
    assert store.encrypted_under(sha256) == {ring(NEW).newest, None}
    back = store.fetch(sha256, cache=root, ring=ring(NEW))
    assert artifact.verify(back, keys=NO_KEYS) == manifest
    store.encrypt(sha256, ring=ring(NEW))
    assert store.encrypted_under(sha256) == {ring(NEW).newest}


def test_encrypting_leaves_no_plaintext_in_the_cache(
    store: Store, folder: Path, cache: Path
) -> None:
    sha256 = make(folder).content_sha256
    store.publish(folder, ring=ring(OLD))
    store.encrypt(sha256, ring=ring(NEW, OLD))
    assert not list(cache.rglob("*.safetensors"))


def test_a_damaged_header_is_published_again(store: Store, folder: Path, root: Path) -> None:
    sha256 = make(folder).content_sha256
    store.publish(folder, ring=ring(NEW))
    sealed = holds(store, sha256)[WEIGHTS + SUFFIX]
    put(store, sha256, WEIGHTS + SUFFIX, b"x" + sealed[1:])
    assert None in store.encrypted_under(sha256)
    store.publish(folder, ring=ring(NEW))
    store.fetch(sha256, cache=root, ring=ring(NEW))


def test_a_name_that_looks_encrypted(store: Store, folder: Path, root: Path) -> None:
    folder.mkdir()
    (folder / f"weights{SUFFIX}").write_bytes(b"plain")
    (folder / "weights").write_bytes(b"plain, too")
    manifest = make(folder)
    with pytest.raises(ConfigError, match="is named like an encrypted file"):
        store.publish(folder, ring=ring(NEW))
    store.publish(folder, ring=OPEN)
    back = store.fetch(manifest.content_sha256, cache=root, ring=ring(NEW))
    assert artifact.verify(back, keys=NO_KEYS) == manifest


def test_the_folder_itself_says_where_to_read_it(tmp_path: Path, folder: Path) -> None:
    store = Store(tmp_path / "store")
    sha256 = make(folder).content_sha256
    store.publish(folder, ring=ring(NEW))
    with pytest.raises(ConfigError, match="it is encrypted, read it through its store"):
        artifact.load(tmp_path / "store" / sha256, keys=NO_KEYS)


# From the command line


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DATABASE", "ARTIFACTS", "RUNS"):
        monkeypatch.delenv(f"FRONTIER_{name}", raising=False)
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_from_registering_to_rotating(
    home: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: object, code: int = 0) -> str:
        assert main([str(word) for word in words]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    manifest = make(folder)
    assert "there is no key to encrypt with" in run("encrypt", code=1)
    run("register", folder)  # in the open
    keys = tmp_path / "keys"
    keys.write_text(OLD)
    monkeypatch.setenv(VARIABLE_FILE, str(keys))
    told = run("encrypt")
    assert f"would encrypt {manifest.content_sha256} (now: not encrypted)" in told
    assert f"1 due, 0 under {ring(OLD).newest}" in told
    assert (home / "artifacts" / manifest.content_sha256 / WEIGHTS).exists()
    assert f"encrypted {manifest.content_sha256}" in run("encrypt", "--yes")
    assert not (home / "artifacts" / manifest.content_sha256 / WEIGHTS).exists()
    assert "2 files are intact" in run("verify", "digits-cnn@1")

    keys.write_text(f"{NEW}\n{OLD}")
    assert json.loads(run("encrypt", "--json"))["due"] == [manifest.content_sha256]
    assert f"(before: under {ring(OLD).newest})" in run("encrypt", "--yes")
    assert f"0 due, 1 under {ring(NEW).newest}" in run("encrypt")
    keys.write_text(NEW)
    run("export", "digits-cnn@1", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == b"1" * 100


def test_the_environment_says_which_keys(
    folder: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.store import publish

    make(folder)
    monkeypatch.setenv(VARIABLE, NEW)
    uri = publish(folder, tmp_path / "store")
    assert (fetch(uri, root) / WEIGHTS).read_bytes() == b"1" * 100
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError, match="is encrypted under the key"):
        fetch(uri, tmp_path / "elsewhere")
