"""Sealed folders: every byte and every fact is vouched for, and nothing is unpickled."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import artifact
from models.artifact import GateResult, Manifest, load, read, seal, verify
from models.errors import ConfigError
from models.signing import Keys
from tests.models.artifacts import NO_KEYS, facts, make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


def test_what_was_sealed_verifies(folder: Path) -> None:
    manifest = make(folder)
    assert verify(folder, keys=NO_KEYS) == manifest == read(folder, keys=NO_KEYS)
    assert manifest.files.keys() == {"weights.safetensors", "tokenizer/vocabulary.json"}
    assert manifest.size == 108
    assert manifest.passed
    assert Manifest.decode(manifest.encode(), "it") == manifest
    assert manifest.config == {"seed": 0, "net": {"width": 32, "dropout": 0.1}, "shape": [8, 8]}


def test_sealing_again_describes_what_is_there_now(folder: Path) -> None:
    first = make(folder)
    (folder / f".{artifact.MANIFEST}.partial").write_text("of a killed process")
    second = make(folder, "2")
    assert verify(folder, keys=NO_KEYS) == second
    assert second.content_sha256 != first.content_sha256
    assert second.files.keys() == first.files.keys()


def test_the_hash_covers_the_facts_too(folder: Path) -> None:
    first = make(folder)
    second = seal(folder, facts(licence="MIT"), keys=NO_KEYS)
    assert second.files == first.files
    assert second.content_sha256 != first.content_sha256


def test_numbers_that_are_none_are_kept_as_missing(folder: Path) -> None:
    nan = GateResult(metric="loss", value=math.nan, expected="<= 1 (x)", passed=False)
    manifest = make(folder, metrics={"loss": math.nan, "steps": 3}, gates=(nan,))
    assert manifest.metrics == {"loss": None, "steps": 3.0}
    assert manifest.gates[0].value is None
    assert not manifest.passed
    assert verify(folder, keys=NO_KEYS) == manifest


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(st.text("abc.é\n\"'", max_size=5), JSON, max_size=4),
    metrics=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.floats(), max_size=4),
)
def test_any_facts_come_back_as_they_were(
    tmp_path: Path, config: dict[str, Any], metrics: dict[str, float]
) -> None:
    folder = tmp_path / "any"
    folder.mkdir(exist_ok=True)
    (folder / "w.json").write_text("{}")
    manifest = seal(folder, facts(config=config, metrics=metrics), keys=NO_KEYS)
    assert verify(folder, keys=NO_KEYS) == manifest
    assert manifest.config == config


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "weights.safetensors").unlink(), "lacks weights.safetensors"),
        (lambda f: os.truncate(f / "weights.safetensors", 7), "has 7 bytes, expected 100"),
        (lambda f: (f / "weights.safetensors").write_bytes(b"2" * 100), "weights.safetensors is"),
        (lambda f: (f / "tokenizer" / "more.json").write_text(""), "more.json is not in"),
        (lambda f: (f / "link").symlink_to("/etc/passwd"), "link is a link"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is a link or no file"),
        (lambda f: (f / "manifest.json").unlink(), "has no readable manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is not one of ours"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is not one of ours"),
        (lambda f: shutil.rmtree(f), "has no readable manifest.json"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], says: str, folder: Path) -> None:
    make(folder)
    damage(folder)
    with pytest.raises(ConfigError, match=f"^{folder}.*{says}"):
        verify(folder, keys=NO_KEYS)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_any_file_can_change(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "flipped"
    if not folder.exists():
        make(folder)
    file = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    file.write_bytes(changed)
    try:
        if file.name == artifact.MANIFEST and _same_meaning(content, bytes(changed)):
            return  # a blank for a tab
        with pytest.raises(ConfigError):
            verify(folder, keys=NO_KEYS)
    finally:
        file.write_bytes(content)


def _same_meaning(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def edit(folder: Path, **changes: Any) -> None:
    """As somebody would who knows how hashes are made."""
    file = folder / artifact.MANIFEST
    plain = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(plain))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"licence": "MIT"}, "was changed after it was sealed"),
        ({"metrics": {"accuracy": 1.0}}, "was changed after it was sealed"),
        ({"content_sha256": "0" * 64}, "was changed after it was sealed"),
        ({"format": 2}, "has format 2; expected 1"),
        ({"surprise": 1}, "surprise: Unexpected"),
        ({"name": 3}, "name: Input should be a valid string"),
        ({"files": {"../x": {"size": 1, "sha256": ""}}}, "'../x' cannot be the name"),
        ({"files": {"/x": {"size": 1, "sha256": ""}}}, "'/x' cannot be the name"),
        ({"files": {"a/./x": {"size": 1, "sha256": ""}}}, "cannot be the name"),
        ({"files": {"a\\x": {"size": 1, "sha256": ""}}}, "cannot be the name"),
        ({"files": {"manifest.json": {"size": 1, "sha256": ""}}}, "cannot be the name"),
        ({"files": {"x.pkl": {"size": 1, "sha256": ""}}}, "x.pkl is a pickle"),
    ],
)
def test_a_manifest_from_elsewhere(changes: dict[str, Any], says: str, folder: Path) -> None:
    make(folder)
    edit(folder, **changes)
    with pytest.raises(ConfigError, match=says):
        read(folder, keys=NO_KEYS)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "a/model.PKL", "x.joblib", "x.ckpt"])
def test_pickles_are_not_sealed(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(ConfigError, match="is a pickle, which runs code"):
        seal(folder, facts(), keys=NO_KEYS)
    assert not (folder / artifact.MANIFEST).exists()


@pytest.mark.parametrize("protocol", [None, *range(2, pickle.HIGHEST_PROTOCOL + 1)])
def test_pickles_under_another_name_are_neither_sealed_nor_loaded(
    protocol: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    if protocol is None:
        torch.save({"a": torch.ones(2)}, folder / "weights.dat")
    else:
        (folder / "weights.dat").write_bytes(pickle.dumps({"a": [1, 2]}, protocol) + b"\0")
    with pytest.raises(ConfigError, match=r"weights\.dat is a pickle, which runs code"):
        seal(folder, facts(), keys=NO_KEYS)
    with monkeypatch.context() as patch:
        patch.setattr("models.pickles.found_in", lambda _: False)
        seal(folder, facts(), keys=NO_KEYS)
    with pytest.raises(ConfigError, match=r"weights\.dat is a pickle, which runs code"):
        verify(folder, keys=NO_KEYS)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02 and so on", b"PK", b"PK.", b"{}."])
def test_what_only_begins_like_one(content: bytes, folder: Path) -> None:
    folder.mkdir()
    (folder / "vocabulary.dat").write_bytes(content)
    seal(folder, facts(), keys=NO_KEYS)
    assert verify(folder, keys=NO_KEYS).files.keys() == {"vocabulary.dat"}


def test_nothing_to_seal(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        seal(folder, facts(), keys=NO_KEYS)
    folder.mkdir()
    with pytest.raises(ConfigError, match="has no files"):
        seal(folder, facts(), keys=NO_KEYS)


def test_facts_that_are_no_json(folder: Path) -> None:
    assert make(folder, config={"x": math.nan}).config == {"x": None}
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        make(folder, config={"x": object()})


# Loading


class Echo:
    def __init__(self, folder: Path) -> None:
        self.folder = folder


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("models.predictors.echo")
    module.__dict__["load"] = Echo
    monkeypatch.setitem(sys.modules, "models.predictors.echo", module)
    return "models.predictors.echo:load"


def test_load_hands_the_folder_to_its_loader(folder: Path, echo: str) -> None:
    make(folder, loader=echo)
    predictor = load(folder, keys=NO_KEYS)
    assert isinstance(predictor, Echo)
    assert predictor.folder == folder


def test_load_verifies_first(folder: Path, echo: str) -> None:
    make(folder, loader=echo)
    (folder / "weights.safetensors").write_bytes(b"2" * 100)
    with pytest.raises(ConfigError, match=r"weights\.safetensors is damaged"):
        load(folder, keys=NO_KEYS)


@pytest.mark.parametrize(
    "loader",
    [
        "os:system",
        "models.predictors:load",
        "models.predictors.echo",
        "models.predictors.echo:_private",
        "models.predictors..echo:load",
        "models.predictorsx.echo:load",
        "models.predictors.echo:a.b",
        "models.predictors.echo:load\n",
        "",
    ],
)
def test_loaders_come_from_one_package(loader: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected models\.predictors\.FILE:FUNCTION"):
        make(folder, loader=loader)


def test_a_foreign_loader_is_refused_even_if_sealed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(artifact, "check_loader", lambda *_: None)
        make(folder, loader="os:getcwd")
    with pytest.raises(ConfigError, match="code is loaded from nowhere else"):
        load(folder, keys=NO_KEYS)


def test_loaders_that_are_not_there(
    folder: Path, echo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(folder, loader="models.predictors.nowhere:load")
    with pytest.raises(ConfigError, match="has no loader"):
        load(folder, keys=NO_KEYS)
    make(folder, loader="models.predictors.echo:other")
    with pytest.raises(ConfigError, match="has no loader"):
        load(folder, keys=NO_KEYS)
    import models.predictors

    (tmp_path / "needy.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.setattr(models.predictors, "__path__", [str(tmp_path)])
    make(folder, loader="models.predictors.needy:load")
    with pytest.raises(ConfigError, match="needs the package 'a_package_that_is_missing'"):
        load(folder, keys=NO_KEYS)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_inside_an_array_file_does_not_run(folder: Path) -> None:
    """Its name tells nothing, so the loader must not."""
    import numpy as np

    from models.predictors.svc import ARRAYS, FACTS

    folder.mkdir()
    sprung = folder.parent / "sprung"
    (folder / FACTS).write_text(json.dumps({"classes": [0, 1, 2], "gamma": 1, "counts": [1, 1, 1]}))
    trap = np.array([Trap(sprung)], dtype=object)
    np.savez(folder / ARRAYS, vectors=trap, coefficients=trap, intercepts=trap)
    make(folder, loader="models.predictors.svc:load")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load(folder, keys=NO_KEYS)
    assert not sprung.exists()
    with np.load(folder / ARRAYS, allow_pickle=True) as arrays:
        assert len(arrays["vectors"]) == 1
    assert sprung.exists()  # it would have


def test_an_artifact_that_does_not_predict(folder: Path) -> None:
    make(folder)
    with pytest.raises(ConfigError, match="names no loader"):
        load(folder, keys=NO_KEYS)


# Signatures


def write_key(path: Path, pair: Any) -> tuple[str, bytes]:
    """A private key's file, and the public key's PEM."""
    from cryptography.hazmat.primitives import serialization as s

    path.write_bytes(pair.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public = pair.public_key()
    pem: bytes = public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    return str(path), pem


class Ring:
    """Two keys, and files that hold them."""

    def __init__(self, folder: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self.folder = folder
        self.old, self.old_public = write_key(folder / "old.pem", Ed25519PrivateKey.generate())
        self.new, self.new_public = write_key(folder / "new.pem", Ed25519PrivateKey.generate())

    def signer(self, file: str) -> Keys:
        return Keys.of({"FRONTIER_SIGNING_KEY_FILE": file})

    def trusting(self, *public: bytes, required: bool = True) -> Keys:
        trusted = self.folder / "trusted.pem"
        trusted.write_bytes(b"# whom we believe\n" + b"".join(public))
        return Keys.of(
            {
                "FRONTIER_TRUSTED_KEYS_FILE": str(trusted),
                "FRONTIER_REQUIRE_SIGNATURE": "1" if required else "",
            }
        )


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return Ring(tmp_path)


def test_what_a_trusted_key_signed_loads(folder: Path, ring: Ring) -> None:
    make(folder, keys=ring.signer(ring.old))
    verify(folder, keys=ring.trusting(ring.old_public))
    verify(folder, keys=ring.trusting(ring.new_public, ring.old_public))
    verify(folder, keys=NO_KEYS)


def test_openssl_would_say_the_same(folder: Path, ring: Ring) -> None:
    """The signature is plain Ed25519 over the bytes of the manifest."""
    import base64

    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    make(folder, keys=ring.signer(ring.old))
    algorithm, _, signature = (folder / artifact.SIGNATURE).read_text().split()
    assert algorithm == "ed25519"
    key: Any = load_pem_public_key(ring.old_public)
    key.verify(base64.b64decode(signature), (folder / artifact.MANIFEST).read_bytes())


def test_both_keys_are_valid_during_a_rotation(folder: Path, ring: Ring) -> None:
    both = ring.trusting(ring.old_public, ring.new_public)
    for key in (ring.old, ring.new):
        make(folder, keys=ring.signer(key))
        verify(folder, keys=both)
    with pytest.raises(ConfigError, match="expected a signature of"):
        verify(folder, keys=ring.trusting(ring.old_public))


def test_unsigned(folder: Path, ring: Ring) -> None:
    make(folder)
    verify(folder, keys=ring.trusting(ring.old_public, required=False))
    with pytest.raises(ConfigError, match="is not signed; expected a signature of"):
        verify(folder, keys=ring.trusting(ring.old_public))


def test_a_forged_manifest_does_not_fit_its_signature(folder: Path, ring: Ring) -> None:
    make(folder, keys=ring.signer(ring.old))
    signature = (folder / artifact.SIGNATURE).read_bytes()
    make(folder, licence="MIT")
    (folder / artifact.SIGNATURE).write_bytes(signature)
    for required in (True, False):
        with pytest.raises(ConfigError, match="does not fit the manifest"):
            verify(folder, keys=ring.trusting(ring.old_public, required=required))


@pytest.mark.parametrize("content", [b"x", b"rsa a Yg==\n", b"ed25519 a %%\n", b"\xff \xff \xff\n"])
def test_a_damaged_signature_file(content: bytes, folder: Path, ring: Ring) -> None:
    make(folder)
    (folder / artifact.SIGNATURE).write_bytes(content)
    with pytest.raises(ConfigError, match="signature file is damaged"):
        verify(folder, keys=ring.trusting(ring.old_public, required=False))


def test_keys_that_are_none(tmp_path: Path, ring: Ring) -> None:
    def refused(says: str, **environment: str) -> None:
        with pytest.raises(ConfigError, match=says) as raised:
            Keys.of(environment)
        assert "PRIVATE" not in str(raised.value)

    public = tmp_path / "public.pem"
    public.write_bytes(ring.old_public)
    refused("cannot be read", FRONTIER_SIGNING_KEY_FILE="/nowhere")
    refused("no unencrypted Ed25519 private key", FRONTIER_SIGNING_KEY_FILE=str(public))
    refused("holds no public key", FRONTIER_TRUSTED_KEYS_FILE=ring.old)
    refused("nobody is trusted", FRONTIER_REQUIRE_SIGNATURE="1")
    refused("expected 1 or 0", FRONTIER_REQUIRE_SIGNATURE="maybe")


def test_the_environment_says_whom_to_trust(
    folder: Path, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder)
    trusted = folder.parent / "trusted.pem"
    trusted.write_bytes(ring.old_public)
    monkeypatch.setenv("FRONTIER_TRUSTED_KEYS_FILE", str(trusted))
    monkeypatch.setenv("FRONTIER_REQUIRE_SIGNATURE", "1")
    with pytest.raises(ConfigError, match="is not signed"):
        load(folder)
