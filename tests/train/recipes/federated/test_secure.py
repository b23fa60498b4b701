"""The sum is exact, whoever is gone; what the server sees says nothing about one member."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.errors import InternalError
from train.recipes.federated import secure
from train.recipes.federated.secure import Member, PublicKeys, Ring


def repeatable(seed: object) -> Callable[[int], bytes]:
    """Random bytes that a failing example can show again."""
    state = hashlib.shake_256(repr(seed).encode()).digest(1 << 16)
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        place += count
        assert place <= len(state)
        return state[place - count : place]

    return take


def dealt(count: int, threshold: int, seed: object = 0) -> list[Member]:
    """Members after step 2."""
    members = [Member(index, repeatable((seed, index))) for index in range(count)]
    keys = {member.index: member.keys() for member in members}
    letters = {member.index: member.deal(keys, threshold) for member in members}
    for member in members:
        member.receive(
            {
                sender: sent[member.index]
                for sender, sent in letters.items()
                if sender != member.index
            }
        )
    return members


def keys_of(members: list[Member]) -> Mapping[int, PublicKeys]:
    return {member.index: member.keys() for member in members}


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, int, list[int], list[list[int]]]:
    """Members, threshold, who answers, and everyone's vector."""
    count = draw(st.integers(2, 6))
    threshold = draw(st.integers(count // 2 + 1, count))
    order = draw(st.permutations(range(count)))
    answered = order[: draw(st.integers(threshold, count))]
    size = draw(st.integers(1, 5))
    whole = st.integers(0, 2**32 - 1)
    vectors = st.lists(whole, min_size=size, max_size=size)
    return count, threshold, answered, draw(st.lists(vectors, min_size=count, max_size=count))


@settings(max_examples=40)
@given(rounds())
def test_the_sum_of_who_answered_is_exact(
    round: tuple[int, int, list[int], list[list[int]]],
) -> None:
    count, threshold, answered, rows = round
    vectors = np.array(rows, np.uint32)
    members = dealt(count, threshold)
    masked = {index: members[index].pads().mask(vectors[index]) for index in answered}
    opened = [members[index].open(set(answered)) for index in answered]

    total = secure.unmask(masked, keys_of(members), opened, threshold)

    assert total.tolist() == (vectors[answered].astype(object).sum(0) % 2**32).tolist()


def test_too_few_members_reveal_nothing() -> None:
    members = dealt(4, 3)
    zeros = np.zeros(8, np.uint32)
    masked = {index: members[index].pads().mask(zeros) for index in (0, 1)}
    opened = [members[index].open({0, 1}) for index in (0, 1)]
    with pytest.raises(secure.TooFewMembers, match="2 of 4 members opened their shares; 3 are"):
        secure.unmask(masked, keys_of(members), opened, 3)
    with pytest.raises(InternalError, match="do not belong together"):  # 2 points of a parabola
        secure.combine({told.member: told.seeds[0] for told in opened})


def uniform(vector: Ring) -> float:
    """Chi-square of all bytes over 255 degrees of freedom; about 1 for uniform ones."""
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    expected = vector.nbytes / 256
    return float(((counts - expected) ** 2 / expected).sum() / 255)


def test_what_the_server_sees_of_one_member_looks_random() -> None:
    values = secure.encode(np.linspace(-1, 1, 1 << 16), members=3)
    members = dealt(3, 2)
    masked = {m.index: m.pads().mask(values) for m in members}
    assert uniform(values) > 10  # so the test can tell
    for vector in masked.values():
        assert 0.6 < uniform(vector) < 1.4
        # also after everything the server could subtract: the others' vectors
        assert 0.6 < uniform(vector - values) < 1.4
    opened = [member.open({0, 1}) for member in members[:2]]
    # Member 2 was late, not gone: its key is open, so its pads with others are known …
    key = secure.combine({told.member: told.keys[2] for told in opened})
    late = masked[2].copy()
    for other in (0, 1):
        late += secure.pad(secure._agree(key, members[other].keys().mask), late.size)
    # … but its own pad is not, and hides it.
    assert 0.6 < uniform(late) < 1.4
    late -= secure.pad(members[2].pads().own, late.size)
    assert late.tolist() == values.tolist()


def test_a_member_opens_one_share_of_each_other_and_only_once() -> None:
    members = dealt(4, 3)
    told = members[0].open({0, 1, 2})
    assert told.seeds.keys() == {0, 1, 2}
    assert told.keys.keys() == {3}
    with pytest.raises(InternalError, match="asked twice"):
        members[0].open({0, 1, 3})


def test_a_threshold_of_half_the_members_is_refused() -> None:
    member = Member(0)
    keys = {index: Member(index).keys() for index in range(1, 4)} | {0: member.keys()}
    with pytest.raises(ValueError, match="threshold 2 is not in 3 … 4"):
        member.deal(keys, 2)


def test_a_letter_opens_only_for_its_reader() -> None:
    members = [Member(index) for index in range(3)]
    keys = keys_of(members)
    letters = members[0].deal(keys, 2)
    sent_back = members[1].deal(keys, 2)[0]
    with pytest.raises(InvalidTag):
        members[1].receive({0: letters[2]})
    with pytest.raises(InvalidTag):
        members[1].receive({0: sent_back})
    changed = bytearray(letters[1])
    changed[-1] ^= 1
    with pytest.raises(InvalidTag):
        members[1].receive({0: bytes(changed)})
    members[1].receive({0: letters[1]})


def test_pads_are_new_in_every_round() -> None:
    assert Member(0).pads().own != Member(0).pads().own
    assert Member(0).keys() != Member(0).keys()


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=1, max_size=20))
def test_fixed_point_sums_are_sums_of_what_was_rounded(rows: list[list[float]]) -> None:
    values = np.array(rows)
    total = np.zeros(3, np.uint32)
    for row in values:
        total += secure.encode(row, members=20)
    rounded: NDArray[np.float64] = np.rint(values * 2**20) / 2**20
    assert secure.decode(total).tolist() == rounded.sum(0).tolist()


@pytest.mark.parametrize("value", [102.5, -102.5, float("nan"), float("inf")])
def test_what_could_wrap_is_refused(value: float) -> None:
    with pytest.raises(InternalError, match="does not fit the sum of 20"):
        secure.encode(np.array([0.0, value]), members=20)
