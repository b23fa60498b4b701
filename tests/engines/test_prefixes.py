"""The index of kept beginnings, against a dictionary of what every block was filled with."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deployments.engines.prefixes import BLOCK, PrefixIndex

SPACES = ["ada", "bob"]
parts = st.sampled_from([(n,) * BLOCK for n in range(3)])
texts = st.builds(
    lambda whole, rest: sum(whole, ()) + rest,
    st.lists(parts, max_size=5),
    st.sampled_from([(), (9,), (9,) * (BLOCK - 1)]),
)


class PrefixMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(0, 9))
    def start(self, blocks: int) -> None:
        self.blocks = blocks
        self.index = PrefixIndex(blocks)
        self.content: dict[int, Any] = {}
        """Space and all tokens up to the block's end."""

    def check(self, space: str, tokens: tuple[int, ...], found: tuple[int, ...]) -> None:
        for number, block in enumerate(found, 1):
            assert self.content[block] == (space, tokens[: number * BLOCK])

    @rule(space=st.sampled_from(SPACES), tokens=texts)
    def find(self, space: str, tokens: tuple[int, ...]) -> None:
        self.check(space, tokens, self.index.find(space, tokens))

    @rule(space=st.sampled_from(SPACES), tokens=texts)
    def keep(self, space: str, tokens: tuple[int, ...]) -> None:
        known = self.index.find(space, tokens)
        start, new = self.index.keep(space, tokens)
        assert start == len(known) * BLOCK
        for number, block in enumerate(new, len(known) + 1):
            assert 0 <= block < self.blocks
            self.content[block] = (space, tokens[: number * BLOCK])
        whole = min(len(tokens) // BLOCK, self.blocks)
        found = self.index.find(space, tokens)
        assert found == (*known, *new)
        assert len(found) == whole, "there was room"
        self.check(space, tokens, found)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.content.clear()

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "index"):
            self.index.check_integrity()
            assert len(self.index) <= self.blocks


PrefixMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
TestPrefixes = PrefixMachine.TestCase


def test_the_one_used_longest_ago_goes_and_never_before_what_builds_on_it() -> None:
    index = PrefixIndex(4)
    one, two = (1,) * BLOCK, (2,) * BLOCK
    index.keep("t", one + one)
    index.keep("t", two + two)
    assert len(index.find("t", one + one)) == 2  # used again
    index.keep("t", (3,) * BLOCK)
    assert len(index.find("t", two + two)) == 1, "its end went, not its beginning"
    assert len(index.find("t", one + one)) == 2


def test_one_long_text_takes_no_more_than_there_is() -> None:
    index = PrefixIndex(3)
    start, blocks = index.keep("t", tuple(range(5 * BLOCK)))
    assert (start, len(blocks)) == (0, 3)
    assert index.keep("t", tuple(range(5 * BLOCK))) == (3 * BLOCK, ())
    assert index.keep("u", (1,) * BLOCK)[1] == (blocks[-1],)
