"""``hf:ORG/NAME[@REVISION]``: a repository of the Hugging Face Hub.

``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what they always mean; offline,
the hub's own cache is looked into. A branch is fetched once and kept: name a commit to say
exactly which weights.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.errors import ConfigError, PlatformError, Unavailable
from models.sources import folder
from models.sources.cache import Provenance, Workspace

Download = Callable[[str, str | None, Path, Callable[[int], None]], str]
"""Of a repository and a revision, into a folder, asking ``Workspace.need``; says the commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    name: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> Repository:
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", text)
        if match is None:
            raise ConfigError(f"hf:{text} is not a Hub source; expected hf:ORG/NAME[@REVISION]")
        return cls(name=match[1], revision=match[2])

    def __str__(self) -> str:
        return f"hf:{self.name}" + (f"@{self.revision}" if self.revision else "")

    def fill(self, workspace: Workspace, sha256: str | None, download: Download) -> Provenance:
        workspace.report(f"downloading {self}")
        commit = download(self.name, self.revision, workspace.out, workspace.need)
        shutil.rmtree(workspace.out / ".cache", ignore_errors=True)
        digest = folder.sha256_weights(folder.weights(workspace.out))
        folder.expect_sha256(str(self), digest, sha256)
        return Provenance(revision=commit, weights_sha256=digest)


def download(name: str, revision: str | None, into: Path, need: Callable[[int], None]) -> str:
    """Fetch through huggingface_hub, without pickles and code.

    Raises:
        ConfigError: no such repository or revision, or no permission.
        Unavailable: the Hub is out of reach, or the disk too small.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    patterns = [f"*{suffix}" for suffix in folder.SUFFIXES]
    try:
        if constants.is_offline_mode():
            found = snapshot_download(name, revision=revision, allow_patterns=patterns)
            shutil.copytree(found, into, ignore=_other_files, dirs_exist_ok=True)
            return Path(found).name
        repository = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = [f for f in repository.siblings or () if f.rfilename.endswith(folder.SUFFIXES)]
        need(sum(file.size or 0 for file in files))
        commit = repository.sha or ""
        snapshot_download(name, revision=commit, allow_patterns=patterns, local_dir=into)
        return commit
    except PlatformError:
        raise
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ConfigError(
            f"hf:{name}: no such repository or revision, or no permission ({_line(error)}); "
            "check the name; for private and gated models set HF_TOKEN"
        ) from error
    except Exception as error:  # of the hub's choice of HTTP library
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault; the cache explains it
        raise Unavailable(
            f"hf:{name}: the Hub is out of reach and its cache has no copy ({_line(error)}); "
            "check the network, or give a local folder"
        ) from error


def _other_files(directory: str, names: list[str]) -> list[str]:
    paths = [Path(directory, name) for name in names]
    return [p.name for p in paths if p.is_file() and p.suffix not in folder.SUFFIXES]


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
