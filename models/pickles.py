"""Telling a pickle, which runs code when it is loaded, by its name and by its bytes."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path, PurePath
from typing import IO

SUFFIXES = {".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt", ".bin"}
"""Of what a loader could only unpickle."""
PLAIN = {".safetensors"}
"""Whose first bytes are a length, which may look like anything; its loader unpickles nothing."""


def named(path: PurePath | str) -> bool:
    return PurePath(path).suffix.lower() in SUFFIXES


def found_in(file: Path) -> bool:
    """Whether a file is one, or a zip that holds one (as ``torch.save`` writes), whatever its name.

    Of protocol 2 and later, which pickles have had since Python 3; older ones are plain letters.
    """
    if file.suffix.lower() in PLAIN:
        return False
    with file.open("rb") as content:
        head = content.read(2)
        content.seek(0)
        if head[:1] == pickle.PROTO and head[1:] and 2 <= head[1] <= pickle.HIGHEST_PROTOCOL:
            return _is_whole(content)
    if head != b"PK":
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(named(name) for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _is_whole(content: IO[bytes]) -> bool:
    """Whether its instructions make sense up to the last; none is carried out."""
    try:
        return any(code.name == "STOP" for code, _, _ in pickletools.genops(content))
    except ValueError:
        return False
