"""Secure aggregation: the server learns a sum and no summand.

    member (keeps its secrets)                        server (sees only what arrives here)
    1 keys     two fresh X25519 pairs              ─► public keys, passed on to all
    2 deal     mask key and own seed, cut in shares ─► sealed letters, member to member
    3 mask     values + own pad ± a pad with each   ─► a masked vector
    4 open     for who answered a share of its seed, ─► the sum of who answered
               for who is gone a share of its key

A pad shared by two members is added by one and subtracted by the other, so the pads of those
who answer cancel. Who is gone after step 2 leaves pads behind: its key is put together again
from the shares of the others. Every member's own pad keeps its vector hidden even then, when
it only was late; no member ever opens both shares of another. From less than ``threshold``
shares nothing follows.

Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning, in
its form for a server that is curious but keeps to the protocol. A server that lies (about
public keys, or differently to each member about who is gone) needs the signed form, and is
not defended against here.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from models.errors import InternalError

Ring: TypeAlias = NDArray[np.uint32]
"""Vectors of integers modulo 2³²; adding and subtracting wraps."""
Random: TypeAlias = Callable[[int], bytes]

PRIME = 2**521 - 1
"""Field of the secret shares; has room for a secret of 32 bytes."""
SHARE_BYTES = 66

FRACTION_BITS = 20


class TooFewMembers(InternalError):
    """Less than ``threshold`` members answered: their sum stays hidden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKeys:
    mask: bytes
    """With another's, gives the pad of the two."""
    letter: bytes
    """With another's, seals letters between the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What one member tells the server at the end: its shares of others' secrets."""

    member: int
    seeds: Mapping[int, int]
    """Of who answered."""
    keys: Mapping[int, int]
    """Of who is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pads:
    """A member's secrets for step 3."""

    own: bytes
    added: tuple[bytes, ...]
    subtracted: tuple[bytes, ...]

    def mask(self, values: Ring) -> Ring:
        masked = values + pad(self.own, values.size)
        for seed in self.added:
            masked += pad(seed, values.size)
        for seed in self.subtracted:
            masked -= pad(seed, values.size)
        return masked


class Member:
    """One participant's side of one round.

    Args:
        index: from 0, unique in the round.
        random: of bytes; the operating system's unless a test wants to repeat itself.
    """

    def __init__(self, index: int, random: Random = secrets.token_bytes) -> None:
        self.index = index
        self._random = random
        self._mask_key = random(32)
        self._letter_key = random(32)
        self._seed = random(32)
        self._others: dict[int, PublicKeys] = {}
        self._held: dict[int, tuple[int, int]] = {}
        self._opened = False

    def keys(self) -> PublicKeys:
        return PublicKeys(mask=_public(self._mask_key), letter=_public(self._letter_key))

    def deal(self, keys: Mapping[int, PublicKeys], threshold: int) -> dict[int, bytes]:
        """A sealed letter to each other member, with its shares of our two secrets.

        Args:
            keys: of all members of the round, ours included.
            threshold: so many shares give a secret; more than half of the members, or two
                halves of them could be told different stories and open both secrets.
        """
        if not len(keys) // 2 < threshold <= len(keys):
            raise ValueError(f"threshold {threshold} is not in {len(keys) // 2 + 1} … {len(keys)}")
        self._others = {index: key for index, key in keys.items() if index != self.index}
        mask_shares = split(self._mask_key, keys, threshold, self._random)
        seed_shares = split(self._seed, keys, threshold, self._random)
        self._held[self.index] = mask_shares[self.index], seed_shares[self.index]
        return {
            other: self._seal(other, mask_shares[other], seed_shares[other])
            for other in self._others
        }

    def receive(self, letters: Mapping[int, bytes]) -> None:
        """Open what the others dealt to us, by sender.

        Raises:
            cryptography.exceptions.InvalidTag: a letter was changed on its way.
        """
        for sender, letter in letters.items():
            plain = self._cipher(sender).decrypt(letter[:12], letter[12:], _way(sender, self.index))
            self._held[sender] = (
                int.from_bytes(plain[:SHARE_BYTES], "big"),
                int.from_bytes(plain[SHARE_BYTES:], "big"),
            )

    def pads(self) -> Pads:
        seeds = {o: _agree(self._mask_key, keys.mask) for o, keys in self._others.items()}
        return Pads(
            own=self._seed,
            added=tuple(seed for other, seed in seeds.items() if other > self.index),
            subtracted=tuple(seed for other, seed in seeds.items() if other < self.index),
        )

    def open(self, answered: Collection[int]) -> Opened:
        """Our shares, once: of the seeds of who answered, of the keys of who did not."""
        if self._opened:
            raise InternalError(f"member {self.index} was asked twice; it opens one share each")
        self._opened = True
        return Opened(
            member=self.index,
            seeds={i: seed for i, (_, seed) in self._held.items() if i in answered},
            keys={i: key for i, (key, _) in self._held.items() if i not in answered},
        )

    def _seal(self, other: int, *shares: int) -> bytes:
        nonce = self._random(12)
        plain = b"".join(share.to_bytes(SHARE_BYTES, "big") for share in shares)
        return nonce + self._cipher(other).encrypt(nonce, plain, _way(self.index, other))

    def _cipher(self, other: int) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(_agree(self._letter_key, self._others[other].letter))


def unmask(
    masked: Mapping[int, Ring],
    keys: Mapping[int, PublicKeys],
    opened: Iterable[Opened],
    threshold: int,
) -> Ring:
    """The server's last step: the sum of what the members in ``masked`` put in.

    Args:
        masked: vectors of equal length, by the member that answered.
        keys: of all that dealt shares; those not in ``masked`` are gone.

    Raises:
        TooFewMembers: less than ``threshold`` opened their shares.
    """
    told = list(opened)
    if len(told) < threshold:
        raise TooFewMembers(
            f"{len(told)} of {len(keys)} members opened their shares; {threshold} are needed"
        )
    told = told[:threshold]
    total: Ring = np.zeros_like(next(iter(masked.values())))
    for vector in masked.values():
        total += vector
    for index in masked:
        total -= pad(combine({o.member: o.seeds[index] for o in told}), total.size)
    for gone in keys.keys() - masked.keys():
        key = combine({o.member: o.keys[gone] for o in told})
        for index in masked:
            left = pad(_agree(key, keys[index].mask), total.size)
            # The one with the lower index had added the pad.
            if index < gone:
                total -= left
            else:
                total += left
    return total


def encode(values: NDArray[np.floating], members: int) -> Ring:
    """Fixed point with ``FRACTION_BITS`` binary places; ``members`` such vectors add up exactly.

    Raises:
        InternalError: a value so large that the sum could wrap.
    """
    bound = 2.0 ** (31 - FRACTION_BITS) / members
    largest = float(np.abs(values).max(initial=0.0))
    if not largest < bound - 2.0**-FRACTION_BITS:  # NaN is not, either
        raise InternalError(
            f"an update of {largest:g} does not fit the sum of {members} (below {bound:g}); "
            "training diverges: lower learning_rate, or set clip"
        )
    scaled = np.rint(np.asarray(values, np.float64) * 2.0**FRACTION_BITS)
    return scaled.astype(np.int32).view(np.uint32)


def decode(total: Ring) -> NDArray[np.float64]:
    return total.view(np.int32).astype(np.float64) / 2.0**FRACTION_BITS


def pad(seed: bytes, size: int) -> Ring:
    """``size`` uniform integers: the key stream of AES-256 in counter mode."""
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(4 * size)), np.dtype("<u4")).astype(np.uint32)


def split(secret: bytes, holders: Iterable[int], threshold: int, random: Random) -> dict[int, int]:
    """Shamir 1979: a share for each holder; any ``threshold`` of them give the secret."""
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [int.from_bytes(random(80), "big") % PRIME for _ in range(threshold - 1)]
    shares = {}
    for holder in holders:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * (holder + 1) + coefficient) % PRIME
        shares[holder] = value
    return shares


def combine(shares: Mapping[int, int]) -> bytes:
    """The secret of 32 bytes, from at least ``threshold`` shares by holder."""
    secret = 0
    for holder, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != holder:
                above = above * (other + 1) % PRIME
                below = below * (other - holder) % PRIME
        secret = (secret + share * above * pow(below, -1, PRIME)) % PRIME
    if secret >> 256:
        raise InternalError("the shares do not belong together: they give no secret of 32 bytes")
    return secret.to_bytes(32, "big")


def _public(key: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()


def _agree(key: bytes, public: bytes) -> bytes:
    shared = X25519PrivateKey.from_private_bytes(key).exchange(
        X25519PublicKey.from_public_bytes(public)
    )
    return hashlib.sha256(shared).digest()


def _way(sender: int, receiver: int) -> bytes:
    """Bound to each letter, so that it cannot be turned back or passed to another."""
    return f"{sender}>{receiver}".encode()
