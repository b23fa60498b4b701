"""Only who has the secret, only now, only these bytes."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.webhooks.signature import HEADER, MOST_PARTS, Signature, signed
from models.errors import Unauthorized

OLD, NEW, OTHER = (
    b"old-secret-of-16-or-more",
    b"new-secret-of-16-or-more",
    b"of-somebody-else-altogether",
)
NOW, WINDOW = 1_764_030_000, 300
BODY = b'{"id":"evt_1"}'


def check(
    header: str, body: bytes = BODY, secrets: tuple[bytes, ...] = (NEW,), now: float = NOW
) -> None:
    Signature.parse(header).verify(body, secrets, now=now, window_s=WINDOW)


def test_it_is_an_hmac_of_time_dot_body() -> None:
    by_hand = hmac.new(NEW, b"1764030000." + BODY, hashlib.sha256).hexdigest()
    assert signed(BODY, (NEW,), at=NOW) == f"t=1764030000,v1={by_hand}"
    check(f"t=1764030000,v1={by_hand}")
    check(f"v1={by_hand.upper()}, t=1764030000")


@pytest.mark.parametrize(
    ("signs", "knows"), [((OLD,), (NEW, OLD)), ((OLD, NEW), (NEW,)), ((OLD, NEW), (OLD,))]
)
def test_while_one_side_rotates_one_pair_is_enough(
    signs: tuple[bytes, ...], knows: tuple[bytes, ...]
) -> None:
    check(signed(BODY, signs, at=NOW), secrets=knows)


def test_other_schemes_are_passed_over_and_do_not_count() -> None:
    good = signed(BODY, (NEW,), at=NOW)
    check(f"{good},v0=anything,v2=")
    with pytest.raises(Unauthorized, match="expected t="):
        check(good.replace("v1=", "v0="))


@pytest.mark.parametrize("skew", [-WINDOW, WINDOW, 0, -1])
def test_inside_the_window(skew: int) -> None:
    check(signed(BODY, (NEW,), at=NOW + skew))


@pytest.mark.parametrize(
    ("at", "now", "words"),
    [
        (NOW - 301, NOW, r"301 s in the past; at most 300 s"),
        (NOW + 301, NOW, r"301 s in the future; at most 300 s"),
        (NOW - 300, NOW + 0.25, r"301 s in the past"),
        (0, NOW, r"1764030000 s in the past"),
    ],
)
def test_outside_of_it(at: int, now: float, words: str) -> None:
    with pytest.raises(Unauthorized, match=words) as refusal:
        check(signed(BODY, (NEW,), at=at), now=now)
    assert refusal.value.details == {"skew_s": round(at - now, 3), "window_s": WINDOW}


@pytest.mark.parametrize(
    ("header", "body", "secrets"),
    [
        (signed(BODY, (OTHER,), at=NOW), BODY, (NEW, OLD)),
        (signed(BODY, (NEW,), at=NOW), BODY + b" ", (NEW, OLD)),
        (signed(BODY, (NEW,), at=NOW), b"", (NEW, OLD)),
        (signed(BODY, (NEW,), at=NOW).replace(str(NOW), str(NOW + 1)), BODY, (NEW, OLD)),
        (signed(BODY, (NEW,), at=NOW).replace(str(NOW), f"0{NOW}"), BODY, (NEW, OLD)),
        (f"t={NOW},v1={'0' * 64}", BODY, (NEW, OLD)),
    ],
)
def test_what_does_not_fit(header: str, body: bytes, secrets: tuple[bytes, ...]) -> None:
    with pytest.raises(Unauthorized, match="No signature fits") as refusal:
        check(header, body, secrets)
    right = signed(body, (NEW,), at=NOW).partition("v1=")[2]
    assert right not in refusal.value.message


HEX = "a" * 64


@pytest.mark.parametrize(
    "header",
    [
        "nonsense",
        ",",
        f"t={NOW}",
        f"v1={HEX}",
        f"t={NOW},v1=",
        f"t={NOW},v1={HEX}0",
        f"t={NOW},v1={HEX[1:]}g",
        f"t={NOW},v1={HEX},v1=x",
        f"t={NOW},v1={HEX},",
        f"t={NOW},t={NOW},v1={HEX}",
        f"t={NOW}.0,v1={HEX}",
        f"t=-{NOW},v1={HEX}",
        f"t=,v1={HEX}",
        f"t=٣,v1={HEX}",
        f"t=1_7,v1={HEX}",
        f"t={'9' * 5000},v1={HEX}",
        f"t={NOW};v1={HEX}",
        f"t={NOW}" + f",v1={HEX}" * MOST_PARTS,
    ],
)
def test_what_is_not_of_the_form(header: str) -> None:
    with pytest.raises(Unauthorized, match=rf"{HEADER} is .*; expected t=<unix seconds>"):
        check(header)


def test_no_signature_at_all() -> None:
    with pytest.raises(Unauthorized, match=f"send {HEADER}: t="):
        check("")


PIECES = st.sampled_from(
    ["t=", "v1=", ",", str(NOW), HEX, " ", "=", "\x00", "é", "t", "v1", "-1", "1" * 12]
)


@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=60))
def test_nothing_else_is_ever_raised(header: str) -> None:
    with pytest.raises(Unauthorized):
        check(header)


@given(
    st.binary(max_size=50),
    st.binary(max_size=50),
    st.integers(NOW - 2 * WINDOW, NOW + 2 * WINDOW),
    st.lists(st.sampled_from([OLD, NEW, OTHER]), min_size=1, max_size=3),
    st.lists(st.sampled_from([OLD, NEW, OTHER]), min_size=1, max_size=2),
)
def test_it_holds_if_and_only_if_all_three_do(
    sent: bytes, came: bytes, at: int, signs: list[bytes], knows: list[bytes]
) -> None:
    header = signed(sent, signs, at=at)
    for body in (sent, came):
        holds = body == sent and abs(at - NOW) <= WINDOW and bool(set(signs) & set(knows))
        try:
            check(header, body, tuple(knows))
        except Unauthorized:
            assert not holds
        else:
            assert holds
