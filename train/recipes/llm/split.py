"""Which documents are held out: by content, the same ones whatever the seed and order.

Documents that share a paragraph stay on one side, so that what is evaluated has not been
trained on: the language reference repeats whole sections under several topics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from models.errors import ConfigError
from train.recipes.llm.rows import Chat, Completion, Origin, Preference, Row, Text

PARAGRAPH = 60
"""Characters from which a repeated paragraph counts."""
BOILERPLATE = 20
"""A paragraph of more documents than this is a heading or a licence, and binds nobody."""


def split(rows: Sequence[Origin], share: float) -> tuple[list[Origin], list[Origin]]:
    """What to train on, and what to hold out: about ``share`` of the characters.

    A single document is cut in two.

    Raises:
        ConfigError: nothing can be held out.
    """
    if len(rows) == 1 and isinstance(rows[0].row, Text):
        return _cut(rows[0], share)
    sizes = [_size(origin.row) for origin in rows]
    families = sorted(_families(rows), key=lambda family: _digest(rows[family[0]].row))
    room = share * sum(sizes)
    held: set[int] = set()
    for family in families:
        size = sum(sizes[i] for i in family)
        if size <= room and len(held) + len(family) < len(rows):
            held.update(family)
            room -= size
    if not held:
        raise ConfigError(
            f"data.held_out ({share:g}) of {len(rows)} rows is less than any that stands alone;"
            " give data.validation, or a larger share"
        )
    train = [origin for i, origin in enumerate(rows) if i not in held]
    return train, [rows[i] for i in sorted(held)]


def _families(rows: Sequence[Origin]) -> list[list[int]]:
    """Indexes of rows that share a paragraph, directly or by others between."""
    owners: dict[bytes, list[int]] = {}
    for index, origin in enumerate(rows):
        for key in _keys(origin.row):
            owners.setdefault(key, []).append(index)
    parent = list(range(len(rows)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for sharing in owners.values():
        if len(sharing) <= BOILERPLATE:
            for other in sharing[1:]:
                parent[find(other)] = find(sharing[0])
    families: dict[int, list[int]] = {}
    for index in range(len(rows)):
        families.setdefault(find(index), []).append(index)
    return [sorted(family, key=lambda i: _digest(rows[i].row)) for family in families.values()]


def _keys(row: Row) -> set[bytes]:
    match row:
        case Text(text=text):
            paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
            texts = [p for p in paragraphs if len(p) >= PARAGRAPH] or [" ".join(text.split())]
        case Completion(prompt=prompt):
            texts = [prompt]
        case Chat(messages=messages):
            texts = [
                "\0".join(m.content for m in messages if m.role not in ("system", "assistant"))
            ]
        case Preference(prompt=prompt):
            texts = [prompt if isinstance(prompt, str) else "\0".join(m.content for m in prompt)]
    return {hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts}


def _size(row: Row) -> int:
    return len(row.model_dump_json())


def _digest(row: Row) -> bytes:
    return hashlib.sha256(row.model_dump_json().encode()).digest()


def _cut(origin: Origin, share: float) -> tuple[list[Origin], list[Origin]]:
    assert isinstance(origin.row, Text)
    text = origin.row.text
    place = text.find("\n\n", int(len(text) * (1 - share)))
    place = place if place >= 0 else text.find("\n", int(len(text) * (1 - share)))
    train, held = text[:place].strip(), text[place:].strip()
    if place < 0 or not (train and held):
        raise ConfigError(f"{origin.where} is one document of one line; give data.validation")
    return (
        [Origin(Text(text=train), origin.where)],
        [Origin(Text(text=held), f"{origin.where} (its end)")],
    )
