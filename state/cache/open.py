"""Which cache a URL means."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from state.cache.contract import Bounds, Cache
from state.errors import StateMisconfigured

EXPECTED = "sqlite:////ABSOLUTE/FILE, redis://[:PASSWORD@]HOST:PORT/NUMBER or memory:"


def open_cache(url: str, bounds: Bounds) -> Cache:
    """Raises StateMisconfigured: no such kind, or a file that cannot be made."""
    scheme, rest = url.partition(":")[::2]
    match scheme:
        case "memory":
            from state.cache.memory import MemoryCache

            return MemoryCache(bounds)
        case "sqlite":
            from state.cache.sqlite import SqliteCache

            file = Path(rest.removeprefix("//"))
            if not file.is_absolute():
                raise StateMisconfigured(f"{url} names no absolute file; expected {EXPECTED}")
            return SqliteCache(file, bounds)
        case "redis" | "rediss":
            from state.cache.redis import RedisCache

            return RedisCache(url, bounds)
    shown = urlsplit(url)._replace(netloc="").geturl() if "@" in url else url
    raise StateMisconfigured(f"cache: {shown!r} is not supported; expected {EXPECTED}")
