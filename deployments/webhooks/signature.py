"""Whether a delivery is from who holds the secret, and from now (spec C4). Pure.

    X-Webhook-Signature: t=1764030000,v1=<HMAC-SHA256 of "1764030000." and the body, in hex>

A sender that rotates its secret may sign with both: one ``v1`` that fits is enough. Other
schemes than ``v1`` are passed over, so that a sender can add a better one before we know it.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from models.errors import Unauthorized

HEADER = "X-Webhook-Signature"
EXPECTED = "t=<unix seconds>,v1=<64 hexadecimal digits>"
MOST_PARTS = 16
"""Far more than anybody rotates; each ``v1`` is compared with every secret."""

_PART = re.compile(r"\s*(?P<name>[a-z][a-z0-9]*)=(?P<value>[^\s,]*)\s*")
_SECONDS = re.compile(r"[0-9]{1,11}")
_HEX = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a sender says of its delivery; not yet believed."""

    time: str
    """Unix seconds as they were written: this text is signed."""
    candidates: tuple[bytes, ...]
    """In lower-case hexadecimal digits."""

    @property
    def seconds(self) -> int:
        return int(self.time)

    @classmethod
    def parse(cls, header: str) -> Self:
        """Raises Unauthorized: missing, or not of the form that is expected."""
        if not header:
            raise Unauthorized(f"The delivery is not signed; send {HEADER}: {EXPECTED}.")
        parts = header.split(",")
        found = [_PART.fullmatch(part) for part in parts[: MOST_PARTS + 1]]
        named = [(one["name"], one["value"]) for one in found if one is not None]
        times = [value for name, value in named if name == "t"]
        given = [value for name, value in named if name == "v1"]
        if (
            len(named) < len(parts)
            or len(parts) > MOST_PARTS
            or len(times) != 1
            or _SECONDS.fullmatch(times[0]) is None
            or not given
            or not all(map(_HEX.fullmatch, given))
        ):
            raise Unauthorized(f"{HEADER} is {header!r:.80}; expected {EXPECTED}.")
        return cls(time=times[0], candidates=tuple(each.lower().encode() for each in given))

    def verify(self, body: bytes, secrets: Sequence[bytes], *, now: float, window_s: float) -> None:
        """Compare with every secret, in a time that does not tell what is wrong.

        Args:
            body: as it came, byte for byte.
            now: unix seconds.

        Raises:
            Unauthorized: it is too old or too early, or no candidate fits.
        """
        skew_s = self.seconds - now
        if abs(skew_s) > window_s:
            raise Unauthorized(
                f"The signature's time is {math.ceil(abs(skew_s))} s in the"
                f" {'future' if skew_s > 0 else 'past'}; at most {window_s:g} s are allowed."
                " Sign each attempt anew, and set the sender's clock.",
                details={"skew_s": round(skew_s, 3), "window_s": window_s},
            )
        expected = [digest(secret, self.time, body) for secret in secrets]
        fits = [
            hmac.compare_digest(one, candidate) for one in expected for candidate in self.candidates
        ]
        if not any(fits):
            raise Unauthorized(
                "No signature fits the body: it was made with another secret, or the body is"
                f" not what was signed. Sign {HEADER}'s t, a dot and the very bytes that are sent."
            )


def digest(secret: bytes, time: str, body: bytes) -> bytes:
    """In lower-case hexadecimal digits."""
    made = hmac.new(secret, f"{time}.".encode(), "sha256")
    made.update(body)
    return made.hexdigest().encode()


def signed(body: bytes, secrets: Sequence[bytes], *, at: int) -> str:
    """The header of a delivery that is signed with each of ``secrets``."""
    time = str(at)
    return ",".join(
        [f"t={time}", *(f"v1={digest(secret, time, body).decode()}" for secret in secrets)]
    )
