"""The plan of what may go, over any registry: nothing that is needed is waste."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from models.collection import Snapshot, needs, plan
from models.store import Stored
from models.versions import State, Use, UseKind, Version

NOW = datetime(2026, 1, 31, tzinfo=UTC)
GRACE = timedelta(hours=24)
HASHES = [letter * 64 for letter in "abcdef"]

hashes = st.sampled_from(HASHES)
ages = st.sampled_from([timedelta(hours=1), GRACE, timedelta(days=9)])


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    versions = tuple(
        Version(
            name="model",
            number=number,
            artifact=artifact,
            uri="",
            kind="",
            size=0,
            state=draw(st.sampled_from(State)),
            created=NOW,
            created_by="",
        )
        for number, artifact in enumerate(draw(st.lists(hashes, max_size=6)), 1)
    )
    uses = tuple(
        Use(
            kind=draw(st.sampled_from(UseKind)),
            name="x",
            replica=str(number),
            artifact=artifact,
            since=NOW,
            seen=NOW - draw(ages),
        )
        for number, artifact in enumerate(draw(st.lists(hashes, max_size=2)))
    )
    return Snapshot(
        versions=versions,
        parents=draw(st.dictionaries(hashes, st.frozensets(hashes, max_size=2), max_size=4)),
        aliased=draw(st.frozensets(st.sampled_from([v.artifact for v in versions]), max_size=2))
        if versions
        else frozenset(),
        uses=uses,
    )


stores = st.lists(
    st.builds(
        Stored, sha256=hashes, complete=st.booleans(), modified=ages.map(lambda age: NOW - age)
    ),
    unique_by=lambda found: found.sha256,
)


@given(snapshots(), stores)
def test_waste_is_what_nobody_needs(snapshot: Snapshot, stored: list[Stored]) -> None:
    found = plan(snapshot, stored, NOW, GRACE)
    waste = {each.sha256 for each in found.waste}
    kept = {each.sha256 for each in stored} - waste
    assert not waste & snapshot.aliased
    for version in snapshot.versions:
        assert version.state is State.ARCHIVED or version.artifact not in waste
    for use in snapshot.uses:
        assert NOW - use.seen >= GRACE or use.artifact not in waste
    for each in stored:
        assert NOW - each.modified >= GRACE or each.sha256 not in waste
    needed = needs(snapshot, NOW, GRACE)
    for child in needed:
        assert not snapshot.parents.get(child, frozenset()) & waste, "a parent of what is needed"
    for each in stored:  # and nothing is kept for no reason
        if each.sha256 in kept:
            assert each.sha256 in needed or NOW - each.modified < GRACE
    assert kept <= found.needed.keys()


def test_reasons() -> None:
    version = Version(
        name="model",
        number=1,
        artifact=HASHES[0],
        uri="",
        kind="",
        size=0,
        state=State.ARCHIVED,
        created=NOW,
        created_by="",
    )
    snapshot = Snapshot(versions=(version,), parents={}, aliased=frozenset(), uses=())
    old = NOW - timedelta(days=9)
    stored = [
        Stored(sha256=HASHES[0], complete=True, modified=old),
        Stored(sha256=HASHES[1], complete=True, modified=old),
        Stored(sha256=HASHES[2], complete=False, modified=old),
        Stored(sha256=HASHES[3], complete=True, modified=NOW),
    ]
    found = plan(snapshot, stored, NOW, GRACE)
    assert [(each.sha256[0], each.reason) for each in found.waste] == [
        ("a", "archived: model@1"),
        ("b", "never registered"),
        ("c", "never finished"),
    ]
    assert found.needed == {HASHES[3]: "it is new"}
