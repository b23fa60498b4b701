"""Publishing and fetching: whole or not at all, the same on a disk and elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fsspec.registry import _registry as imported

from models import artifact
from models.artifact import CARD
from models.cards import model_card
from models.errors import ConfigError, NotFound, Unavailable
from models.store import STAGING, Store, Stored, fetch, publish
from tests.models.artifacts import NO_KEYS, make

ROOT = Path(__file__).parents[2]

SLOW_PUBLISH = """
import os, sys, time
from pathlib import Path
from models import store

folder, place, after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
real, written = os.replace, 0

def replace(source, target):
    global written
    if written == after:
        print("here", flush=True)
        time.sleep(600)
    written += 1
    real(source, target)

store.os.replace = replace
store.publish(folder, place)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


def listed(store: Store) -> list[tuple[str, bool]]:
    return [(found.sha256, found.complete) for found in store.list()]


def test_there_and_back(store: Store, folder: Path, root: Path) -> None:
    manifest = make(folder)
    uri = publish(folder, store)
    assert uri == store.uri(manifest.content_sha256)
    assert store.manifest(manifest.content_sha256) == manifest
    assert store.has(manifest)
    for where in (root, root):  # the second time from the cache
        back = fetch(uri, where)
        assert artifact.verify(back) == manifest
        assert (back / "tokenizer" / "vocabulary.json").read_text() == '{"a": 0}'
    assert listed(store) == [(manifest.content_sha256, True)]


def test_the_model_card_lies_beside_it(store: Store, folder: Path, root: Path) -> None:
    """And vouches for nothing: the manifest does."""
    manifest = make(folder)
    uri = publish(folder, store)
    card = f"{store._root}/{manifest.content_sha256}/{CARD}"
    assert store._fs.cat_file(card).decode() == model_card(manifest)
    store._fs.pipe_file(card, b"a lie")
    assert artifact.verify(fetch(uri, root)) == manifest
    publish(folder, store)
    assert store._fs.cat_file(card).decode() == model_card(manifest)


def test_publishing_again_changes_nothing(store: Store, folder: Path) -> None:
    make(folder)
    uri = publish(folder, store)
    before = list(store.list())
    assert publish(folder, store) == uri
    assert [found.sha256 for found in store.list()] == [found.sha256 for found in before]


def test_what_does_not_verify_is_not_published(store: Store, folder: Path) -> None:
    make(folder)
    (folder / "weights.safetensors").write_bytes(b"2" * 100)
    with pytest.raises(ConfigError, match="is damaged"):
        publish(folder, store)
    assert listed(store) == []


def test_a_half_published_artifact_is_none(store: Store, folder: Path, root: Path) -> None:
    manifest = make(folder)
    uri = publish(folder, store)
    store._fs.rm_file(f"{store._root}/{manifest.content_sha256}/{artifact.MANIFEST}")
    assert listed(store) == [(manifest.content_sha256, False)]
    assert not store.has(manifest)
    with pytest.raises(NotFound, match=f"there is no artifact .*{manifest.content_sha256}"):
        fetch(uri, root)
    publish(folder, store)
    assert artifact.verify(fetch(uri, root)) == manifest


def test_a_file_that_is_cut_short_is_published_again(
    store: Store, folder: Path, root: Path
) -> None:
    manifest = make(folder)
    uri = publish(folder, store)
    cut = f"{store._root}/{manifest.content_sha256}/weights.safetensors"
    store._fs.pipe_file(cut, b"short")
    assert not store.has(manifest)
    with pytest.raises(ConfigError, match=r"weights\.safetensors has 5 bytes"):
        fetch(uri, root)
    publish(folder, store)
    assert artifact.verify(fetch(uri, root)) == manifest


def test_a_store_that_lies_is_not_believed(store: Store, folder: Path, root: Path) -> None:
    manifest = make(folder)
    uri = publish(folder, store)
    place = f"{store._root}/{manifest.content_sha256}"
    store._fs.pipe_file(f"{place}/weights.safetensors", b"2" * 100)
    with pytest.raises(ConfigError, match=r"weights\.safetensors is damaged"):
        fetch(uri, root)
    other = make(folder.parent / "other", "3")
    store._fs.pipe_file(f"{place}/{artifact.MANIFEST}", other.encode())
    with pytest.raises(ConfigError, match=f"holds artifact {other.content_sha256}"):
        fetch(uri, root)


def test_deleting(store: Store, folder: Path) -> None:
    manifest = make(folder)
    publish(folder, store)
    store.delete(manifest.content_sha256)
    assert listed(store) == []
    store.delete(manifest.content_sha256)


def test_an_empty_store(store: Store) -> None:
    assert listed(store) == []
    with pytest.raises(NotFound):
        store.manifest("0" * 64)


def test_signing_on_the_way(store: Store, folder: Path, root: Path) -> None:
    """Made where there is no key, published where there is one."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from models.signing import Keys

    key = Ed25519PrivateKey.generate()
    required = Keys(trusted=(key.public_key(),), required=True)
    make(folder)
    uri = store.publish(folder, keys=NO_KEYS)
    with pytest.raises(ConfigError, match="is not signed"):
        fetch(uri, root, keys=required)
    store.publish(folder, keys=Keys(signing=key, trusted=(key.public_key(),)))
    artifact.verify(fetch(uri, root / "2", keys=required), keys=required)


def test_other_things_beside_artifacts_are_left_alone(tmp_path: Path, folder: Path) -> None:
    store = Store(tmp_path / "store")
    manifest = make(folder)
    publish(folder, store)
    (tmp_path / "store" / "notes.txt").write_text("mine")
    (tmp_path / "store" / "photos").mkdir()
    (tmp_path / "store" / "photos" / "cat.jpg").write_text("mine")
    assert listed(store) == [(manifest.content_sha256, True)]


def test_an_artifact_on_this_disk_is_used_where_it_is(
    tmp_path: Path, folder: Path, root: Path
) -> None:
    manifest = make(folder)
    uri = publish(folder, tmp_path / "store")
    assert fetch(uri, root) == tmp_path / "store" / manifest.content_sha256
    assert not root.exists()


def test_the_default_store_is_where_the_environment_says(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONTIER_ARTIFACTS", str(tmp_path / "elsewhere"))
    manifest = make(folder)
    publish(folder)
    assert fetch(manifest.content_sha256) == tmp_path / "elsewhere" / manifest.content_sha256


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_publication_leaves_nothing_that_counts(
    after: int, tmp_path: Path, folder: Path, root: Path
) -> None:
    """Killed before the first file, before the second, and before the manifest."""
    manifest = make(folder)
    place = tmp_path / "store"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_PUBLISH, str(folder), str(place), str(after)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    store = Store(place)
    assert listed(store) == ([(manifest.content_sha256, False)] if after else [])
    assert not store.has(manifest)
    with pytest.raises(NotFound):
        store.fetch(manifest.content_sha256)
    assert len(list((place / STAGING).iterdir())) == 1
    assert artifact.verify(fetch(publish(folder, store), root)) == manifest
    store.sweep(datetime.now(UTC) - timedelta(hours=1))
    assert len(list((place / STAGING).iterdir())) == 1
    store.sweep(datetime.now(UTC) + timedelta(seconds=1))
    assert list((place / STAGING).iterdir()) == []


def test_processes_that_publish_at_once(tmp_path: Path, folder: Path, root: Path) -> None:
    manifest = make(folder)
    code = "import sys; from pathlib import Path; from models.store import publish\n"
    code += "print(publish(Path(sys.argv[1]), sys.argv[2]))"
    words = [sys.executable, "-c", code, str(folder), str(tmp_path / "store")]
    processes = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    uris = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 3
    (uri,) = uris
    assert artifact.verify(fetch(uri, root)) == manifest


def test_the_age_of_an_artifact_is_that_of_its_newest_file(tmp_path: Path, folder: Path) -> None:
    manifest = make(folder)
    publish(folder, tmp_path / "store")
    place = tmp_path / "store" / manifest.content_sha256
    for file in place.rglob("*"):
        os.utime(file, (1e9, 1e9))
    os.utime(place / "weights.safetensors", (1e9 + 60, 1e9 + 60))
    assert list(Store(tmp_path / "store").list()) == [
        Stored(
            sha256=manifest.content_sha256,
            complete=True,
            modified=datetime.fromtimestamp(1e9 + 60, UTC),
        )
    ]


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nowhere", "'nowhere' is not the content hash"),
        ("s3://bucket/x", "'x' is not the content hash"),
        ("/a/b/c", "'c' is not the content hash"),
    ],
)
def test_what_is_no_artifact(where: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fetch(where)


def test_places_that_are_no_store(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nonsense://host/x: is no place for artifacts"
    ) as raised:
        Store("nonsense://user:hidden@host/x?token=hidden")
    assert "hidden" not in str(raised.value)
    (tmp_path / "file").write_text("")
    make(folder)
    with pytest.raises((ConfigError, Unavailable), match="cannot publish to it"):
        publish(folder, tmp_path / "file")


@pytest.mark.parametrize(
    ("url", "package", "says"),
    [
        (
            "s3://user:hidden@bucket/x",
            "s3fs",
            "s3://bucket/x: needs pip install 'frontier-run[s3]' (",
        ),
        ("gs://bucket/x", "gcsfs", "gs://bucket/x: needs a package that is not here ("),
    ],
    ids=["s3", "gs"],
)
def test_a_store_whose_package_is_missing(
    url: str, package: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(imported, url.partition(":")[0], raising=False)
    with pytest.raises(ConfigError) as raised:
        Store(url)
    told = raised.value.message
    assert told.startswith(says)
    assert package in told
    assert "\n" not in told
    assert "hidden" not in told


def test_fetching_from_afar_happens_once(folder: Path, root: Path) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    manifest = make(folder)
    uri = publish(folder, store)
    first = fetch(uri, root)
    store.delete(manifest.content_sha256)
    began = time.monotonic()
    assert fetch(uri, root) == first
    assert time.monotonic() - began < 5
