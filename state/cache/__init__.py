"""Fast state that may be lost: answers that need not be computed again.

    memory    one process                    tests, a single gateway
    sqlite    all processes of a machine     a file beside the database; the default
    redis     all machines                   Lua, one round trip a call

One contract, one suite of tests. All three keep to a bound in bytes of their own: expired
entries leave first, then those unused for longest.
"""

from __future__ import annotations

from state.cache.contract import Bounds, Cache
from state.cache.lenient import Lenient
from state.cache.open import open_cache

__all__ = ["Bounds", "Cache", "Lenient", "open_cache"]
