"""Which beginnings of prompts are kept in memory, and where: an index over blocks of tokens.

A block holds the keys and values of ``BLOCK`` tokens, which depend on every token before them; so
it is known by the block before it and its own tokens, down to the first, which is known by its
*space*. Spaces share nothing: whoever asks in one cannot tell from the time it takes what others
asked. (Kwon et al., SOSP 2023, do the same by hashes; here the tokens themselves are compared.)

Of a full memory, the block goes that was used longest ago, never before those that build on it.

Pure Python: it decides which blocks to fill and to read, and moves nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

BLOCK = 16
"""Tokens."""

_Path: TypeAlias = "tuple[Hashable, tuple[int, ...]]"
"""The node before, or the space of a first one; and the block's own tokens."""


@dataclass(eq=False, slots=True)
class _Node:
    """One block that is kept. By identity: what is built on one that is gone is not found."""

    path: _Path
    block: int


class PrefixIndex:
    """At most ``blocks`` blocks, numbered from 0."""

    def __init__(self, blocks: int) -> None:
        self._free = list(range(blocks - 1, -1, -1))
        self._nodes: OrderedDict[_Path, _Node] = OrderedDict()
        """The one that was used longest ago first; each after all that build on it."""

    def find(self, space: Hashable, tokens: Sequence[int]) -> tuple[int, ...]:
        """The blocks of the longest beginning of ``tokens`` that is kept, in order."""
        known = self._walk(space, tokens)
        self._touch(known)
        return tuple(node.block for node in known)

    def keep(self, space: Hashable, tokens: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Take in all whole blocks of ``tokens``, as far as there is room for one sequence.

        Returns:
            The blocks that the caller has to fill at once, since they can be found from here on;
            and where the tokens of the first of them begin.
        """
        known = self._walk(space, tokens)
        self._touch(known)  # so that none of them has to make room
        start = len(known)
        new: list[_Node] = []
        before: Hashable = known[-1] if known else space
        for part in list(_parts(tokens))[start:]:
            if not self._free and not self._evict(sparing=start + len(new)):
                break
            node = _Node((before, part), self._free.pop())
            self._nodes[node.path] = before = node
            new.append(node)
        self._touch([*known, *new])
        return start * BLOCK, tuple(node.block for node in new)

    def clear(self) -> None:
        """Forget everything."""
        self._free += [node.block for node in self._nodes.values()]
        self._nodes.clear()

    def __len__(self) -> int:
        """Blocks in use."""
        return len(self._nodes)

    def _walk(self, space: Hashable, tokens: Sequence[int]) -> list[_Node]:
        found: list[_Node] = []
        before: Hashable = space
        for part in _parts(tokens):
            node = self._nodes.get((before, part))
            if node is None:
                break
            found.append(node)
            before = node
        return found

    def _touch(self, chain: Sequence[_Node]) -> None:
        for node in reversed(chain):
            self._nodes.move_to_end(node.path)

    def _evict(self, *, sparing: int) -> bool:
        """Let the oldest block go, unless only the newest ``sparing`` are left."""
        if len(self._nodes) <= sparing:
            return False
        _, node = self._nodes.popitem(last=False)
        self._free.append(node.block)
        return True

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        blocks = [node.block for node in self._nodes.values()] + self._free
        assert len(set(blocks)) == len(blocks), "a block is in two places"
        seen: set[Hashable] = set()
        for path, node in self._nodes.items():
            assert node.path == path
            before, part = path
            assert len(part) == BLOCK
            assert before not in seen, "a block would go before one that builds on it"
            if isinstance(before, _Node):
                assert self._nodes.get(before.path) is before, "a block leads nowhere"
            seen.add(node)


def _parts(tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Whole blocks."""
    for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
        yield tuple(tokens[at : at + BLOCK])
