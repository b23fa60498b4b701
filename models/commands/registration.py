"""``python -m models register | verify | export``: artifacts in, and out again."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
from pathlib import Path

from models import artifact
from models.artifact import CARD, MANIFEST, Manifest
from models.cards import model_card
from models.commands.inspection import REFERENCE
from models.commands.terminal import Commands, myself, show_json
from models.errors import ConfigError, NotFound
from models.registry import open_registry
from models.store import Store, publish
from models.store import fetch as fetch_artifact
from models.versions import Version


def add(commands: Commands) -> None:
    register = commands.add_parser(
        "register",
        help="publish an artifact and give it a version",
        description="Publish a sealed artifact to the store and give it a version, in staging.",
    )
    register.add_argument(
        "folder", type=Path, metavar="DIR", help="a run's directory, or the artifact's own"
    )
    register.add_argument("--name", metavar="NAME", help="default: as its manifest says")
    register.add_argument(
        "--store", metavar="URL", help="a folder or fsspec URL; default: $FRONTIER_ARTIFACTS"
    )
    register.set_defaults(run=_register)

    verify = commands.add_parser(
        "verify",
        help="compare every byte of an artifact with its manifest",
        description="Compare every byte of an artifact, and its signature, with its manifest.",
    )
    verify.add_argument("what", metavar="DIR|NAME[@REF]", help=f"a folder; or {REFERENCE}")
    verify.set_defaults(run=_verify)

    export = commands.add_parser(
        "export",
        help="copy an artifact to a folder",
        description="Copy a verified artifact to a folder that does not exist yet.",
    )
    export.add_argument("reference", metavar="NAME[@REF]", help=REFERENCE)
    export.add_argument("folder", type=Path, metavar="DIR")
    export.set_defaults(run=_export)

    for command in (register, verify):
        command.add_argument("--json", action="store_true", help="for a program")


def _register(arguments: argparse.Namespace) -> int:
    folder = _artifact_in(arguments.folder)

    async def register() -> Version:
        manifest = artifact.verify(folder)
        store = Store(arguments.store)
        async with open_registry() as registry:
            for last in (False, True):
                uri = publish(folder, store)
                try:
                    return await registry.register(manifest, uri, by=myself(), name=arguments.name)
                except NotFound:  # collected between the two lines above
                    if last:
                        raise
        raise AssertionError

    version = asyncio.run(register())
    if arguments.json:
        show_json(version)
    else:
        print(version.full_name)
    return 0


def _artifact_in(folder: Path) -> Path:
    """The artifact of a run's directory, or the folder itself."""
    for found in (folder, folder / "artifact"):
        if (found / MANIFEST).is_file():
            return found
    raise ConfigError(
        f"{folder} has no {MANIFEST}, nor has {folder / 'artifact'}; expected the directory of a "
        "finished run, or a sealed artifact"
    )


async def _fetched(reference: str) -> Path:
    async with open_registry() as registry:
        version = await registry.resolve(reference)
    if version.collected is not None:
        raise NotFound(f"the files of {version} are gone: it was archived and collected")
    return await asyncio.to_thread(fetch_artifact, version.uri)


def _verify(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.what)
    if folder.is_dir():
        manifest = artifact.verify(_artifact_in(folder))
    else:
        manifest = artifact.verify(asyncio.run(_fetched(arguments.what)))
    _say_verified(manifest, arguments.json)
    return 0


def _say_verified(manifest: Manifest, as_json: bool) -> None:
    if as_json:
        show_json(manifest)
    else:
        print(f"{manifest.content_sha256}  {manifest.name}: {len(manifest.files)} files are intact")


def _export(arguments: argparse.Namespace) -> int:
    target: Path = arguments.folder
    if target.exists():
        raise ConfigError(f"{target} exists; expected a folder to be made")
    source = asyncio.run(_fetched(arguments.reference))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as staging:
            copy = Path(staging, "artifact")
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("source.json"))
            (copy / CARD).write_text(model_card(artifact.verify(copy)))
            copy.rename(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror})") from None
    print(target)
    return 0
