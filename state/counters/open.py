"""Which counters a URL means."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from state.counters.contract import Counters
from state.errors import StateMisconfigured

EXPECTED = "sqlite:////ABSOLUTE/FILE, redis://[:PASSWORD@]HOST:PORT/NUMBER or memory:"


def open_counters(url: str) -> Counters:
    """Raises StateMisconfigured: no such kind, or a file that cannot be made."""
    scheme, rest = url.partition(":")[::2]
    match scheme:
        case "memory":
            from state.counters.memory import MemoryCounters

            return MemoryCounters()
        case "sqlite":
            from state.counters.sqlite import SqliteCounters

            file = Path(rest.removeprefix("//"))
            if not file.is_absolute():
                raise StateMisconfigured(f"{url} names no absolute file; expected {EXPECTED}")
            return SqliteCounters(file)
        case "redis" | "rediss":
            from state.counters.redis import RedisCounters

            return RedisCounters(url)
    shown = urlsplit(url)._replace(netloc="").geturl() if "@" in url else url
    raise StateMisconfigured(f"counters: {shown!r} is not supported; expected {EXPECTED}")
