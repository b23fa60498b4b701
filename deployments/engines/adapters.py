"""The adapters of one model: loaded while it runs, bounded in memory, pinned while in use.

::

    request ── lease ──► table ─ hit ────────────────────────────► Lease: pinned until released
                           └─ miss ─► one load a name, for all who wait
                                      resolve → check → make room → read     (threads of its own)

Neither the event loop nor the engine's step ever waits for a file. A load that fails is told
to those who asked for that adapter, and to nobody else. Versions are never changed in place:
a newer one takes the name, and requests that began with the older one end with it.

No torch here: what a version's weights are, only ``lora.py`` knows.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from deployments.observability.events import (
    AdapterEvicted,
    AdapterFailed,
    AdapterLoaded,
    AdaptersResident,
    Emit,
    discard,
)
from models.errors import (
    InternalError,
    InvalidInput,
    NotFound,
    Overloaded,
    PlatformError,
    Timeout,
    Unavailable,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LOADERS = 2
"""Adapters that are loaded at a time; more would only share disk and processor."""
RETRY_AFTER_S = 1.0
"""Where every adapter in memory is in use: about the time of a short answer."""

Resolve: TypeAlias = Callable[[str], Path]
"""Name → folder, of an adapter that nobody has loaded by hand. May take its time (it is called
in a loader's thread) and raises a ``PlatformError`` (``NotFound``) for a name it does not know.
"""

T = TypeVar("T")

_numbers = count(1)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Adapter:
    """One version of an adapter's weights; immutable, compared by identity."""

    name: str
    rank: int
    """The largest of its layers."""
    bytes: int
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """By the layer's name: ``A [rank, inputs]``, and ``B [rank, outputs]`` times its scale."""
    number: int = field(default_factory=lambda: next(_numbers))
    """Its own for as long as the process lives; 0 stands for no adapter."""


class AdapterFile(Protocol):
    """An adapter on disk that was found to fit the model; no weights have been read."""

    @property
    def bytes(self) -> int:
        """What the weights will take in memory."""
        ...

    def read(self) -> Adapter: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What an operator sees."""

    name: str
    folder: str
    rank: int
    bytes: int
    resident: bool
    """False: was evicted, and is loaded again by the next request for it."""
    in_use: int = 0
    """Requests that wait, run, or are about to."""


@dataclass(slots=True, eq=False)
class _Entry:
    adapter: Adapter
    folder: Path
    pins: int = 0
    retired: bool = False
    """Its name belongs to another version, or to nothing; its memory goes with the last pin."""

    def info(self) -> AdapterInfo:
        return AdapterInfo(
            name=self.adapter.name,
            folder=str(self.folder),
            rank=self.adapter.rank,
            bytes=self.adapter.bytes,
            resident=True,
            in_use=self.pins,
        )


@dataclass(slots=True, eq=False)
class _Load:
    """A load that requests wait for."""

    waiters: int = 0
    entry: _Entry | None = None
    """Set when it has succeeded; every waiter then holds a pin."""
    future: Future[_Entry] = field(init=False)


class Lease:
    """An adapter that stays in memory until ``release``."""

    def __init__(self, store: AdapterStore, entry: _Entry) -> None:
        self._store = store
        self._entry: _Entry | None = entry
        self.adapter = entry.adapter

    def release(self) -> None:
        """Idempotent."""
        if self._entry is not None:
            self._store._release(self._entry)
            self._entry = None


class AdapterStore:
    """Adapters by name. Every method may be called from any thread.

    Args:
        model: name, for events and messages.
        open_file: folder → file that fits the model, or ``InvalidInput``.
        max_bytes: of weights in memory, those that are being read included.
        resolve: finds adapters that were not loaded by hand.
    """

    def __init__(
        self,
        model: str,
        open_file: Callable[[str, Path], AdapterFile],
        *,
        max_bytes: int,
        resolve: Resolve | None = None,
        emit: Emit = discard,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._open_file = open_file
        self._max_bytes = max_bytes
        self._resolve = resolve
        self._emit = emit
        self._clock = clock
        self._lock = threading.Lock()
        self._table: dict[str, _Entry] = {}
        """The one used last stands last."""
        self._known: dict[str, AdapterInfo] = {}
        """Loaded by hand, so that they come back after an eviction."""
        self._loads: dict[str, _Load] = {}
        self._retired: set[_Entry] = set()
        self._taken = 0
        """Bytes of the table, of what is retired, and of what is being read."""
        self._reading = 0
        self._loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix=f"adapters-{model}")
        self._closed = False

    def load(self, name: str, folder: Path) -> AdapterInfo:
        """Read an adapter and give it the name; requests from now on get this version. Blocks.

        Raises:
            InvalidInput: the folder holds no adapter that this engine can serve.
            Overloaded: there is no room while the others are in use.
        """
        entry = self._read(name, folder)
        with self._lock:
            self._reading -= 1
            self._loads.pop(name, None)  # who waits for the older version still gets it
            self._insert(entry)
            self._known[name] = entry.info()
            return entry.info()

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that began with it end with it.

        Raises:
            NotFound: nobody knows it.
        """
        with self._lock:
            known = self._known.pop(name, None)
            loading = self._loads.pop(name, None)
            entry = self._table.pop(name, None)
            if entry is not None:
                self._retire(entry)
                self._tell_state()
            elif known is None and loading is None:
                raise self._unknown(name)

    def list(self) -> tuple[AdapterInfo, ...]:
        """By name: those in memory, and those that would come back."""
        with self._lock:
            gone = {name: replace(info, resident=False) for name, info in self._known.items()}
            here = {name: entry.info() for name, entry in self._table.items()}
        return tuple(info for _, info in sorted({**gone, **here}.items()))

    async def lease(self, name: str, *, timeout_s: float | None = None) -> Lease:
        """Pin an adapter, loaded first if need be.

        Raises:
            NotFound: neither was it loaded, nor does ``resolve`` know it.
            Timeout: it did not come in time; the load goes on for the next one.
            PlatformError: as ``load``, or what ``resolve`` raised.
        """
        with self._lock:
            entry = self._table.get(name)
            if entry is not None:
                entry.pins += 1
                self._used(entry)
                return Lease(self, entry)
            load = self._loads.get(name) or self._begin(name)
            load.waiters += 1
        try:
            return Lease(self, await _outcome(load.future, name, timeout_s))
        except BaseException:
            with self._lock:
                load.waiters -= 1
                if load.entry is not None:
                    self._unpin(load.entry)
            raise

    def close(self) -> None:
        """Loads that have not begun are given up; their waiters are told."""
        with self._lock:
            self._closed = True
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every invariant holds; for tests."""
        with self._lock:
            for name, entry in self._table.items():
                assert entry.adapter.name == name
                assert entry.pins >= 0
                assert not entry.retired
            assert all(entry.retired and entry.pins > 0 for entry in self._retired)
            assert all(load.waiters >= 0 for load in self._loads.values())
            held = sum(e.adapter.bytes for e in (*self._table.values(), *self._retired))
            assert held <= self._taken <= self._max_bytes
            assert self._reading or held == self._taken

    # --- in a loader's thread, or that of whoever calls load ----------------------------

    def _load(self, name: str, folder: Path | None, load: _Load) -> _Entry:
        try:
            if folder is None:
                assert self._resolve is not None
                folder = self._guarded(name, partial(self._resolve, name))
            entry = self._read(name, folder)
        except BaseException:
            with self._lock:
                if self._loads.get(name) is load:
                    del self._loads[name]
            raise
        with self._lock:
            self._reading -= 1
            entry.pins = load.waiters
            load.entry = entry
            if self._loads.get(name) is load:
                del self._loads[name]
                self._insert(entry)
            else:  # unloaded, or loaded by hand, meanwhile: for those who wait, and nobody else
                self._retire(entry)
        return entry

    def _read(self, name: str, folder: Path) -> _Entry:
        """Check, make room, read. The bytes stay accounted for, and count as being read until the
        caller has put the entry somewhere.
        """
        began = self._clock()
        file = self._guarded(name, partial(self._open_file, name, folder))
        with self._lock:
            self._make_room(name, file.bytes)
            self._taken += file.bytes
            self._reading += 1
        try:
            adapter = self._guarded(name, file.read)
        except BaseException:
            with self._lock:
                self._taken -= file.bytes
                self._reading -= 1
            raise
        self._emit(AdapterLoaded(model=self._model, duration_s=self._clock() - began))
        return _Entry(adapter, folder)

    def _guarded(self, name: str, work: Callable[[], T]) -> T:
        """Whatever goes wrong becomes an error with a meaning, and an event."""
        try:
            return work()
        except Exception as error:
            if not isinstance(error, NotFound):  # which is the caller's mistake
                self._emit(AdapterFailed(model=self._model, adapter=name, error=repr(error)))
            if isinstance(error, PlatformError):
                raise
            logger.exception("loading adapter %s of %s failed", name, self._model)
            raise InternalError(f"Loading the adapter {name!r} failed: {error}") from error

    # --- holding the lock ---------------------------------------------------------------

    def _begin(self, name: str) -> _Load:
        if self._closed:
            raise Unavailable(f"The engine of {self._model} is stopping.", retry_after=1)
        known = self._known.get(name)
        if known is None and self._resolve is None:
            raise self._unknown(name)
        load = _Load()
        folder = None if known is None else Path(known.folder)
        load.future = self._loaders.submit(self._load, name, folder, load)
        self._loads[name] = load
        return load

    def _unknown(self, name: str) -> NotFound:
        names = ", ".join(sorted({*self._table, *self._known})) or "none"
        return NotFound(
            f"{self._model} has no adapter {name!r}; it has: {names}.",
            param="model",
            details={"adapter": name},
        )

    def _make_room(self, name: str, size: int) -> None:
        if size > self._max_bytes:
            raise InvalidInput(
                f"The adapter {name!r} takes {_mb(size)} of memory;"
                f" engine.adapters.memory_mb allows {_mb(self._max_bytes)} for all together."
            )
        idle = [entry for entry in self._table.values() if not entry.pins]
        if self._taken + size - sum(entry.adapter.bytes for entry in idle) > self._max_bytes:
            raise Overloaded(
                f"There is no room for the adapter {name!r} while the others are in use;"
                f" it takes {_mb(size)} of {_mb(self._max_bytes)}.",
                retry_after=RETRY_AFTER_S,
            )
        for entry in idle:
            if self._taken + size <= self._max_bytes:
                return
            del self._table[entry.adapter.name]
            self._retire(entry)
            self._emit(AdapterEvicted(model=self._model))
            self._tell_state()

    def _insert(self, entry: _Entry) -> None:
        older = self._table.pop(entry.adapter.name, None)
        self._table[entry.adapter.name] = entry
        if older is not None:
            self._retire(older)
        self._tell_state()

    def _retire(self, entry: _Entry) -> None:
        entry.retired = True
        if entry.pins:
            self._retired.add(entry)
        else:
            self._taken -= entry.adapter.bytes

    def _unpin(self, entry: _Entry) -> None:
        entry.pins -= 1
        if not entry.retired:
            self._used(entry)
        elif not entry.pins:
            self._retired.remove(entry)
            self._taken -= entry.adapter.bytes
            self._tell_state()

    def _used(self, entry: _Entry) -> None:
        self._table[entry.adapter.name] = self._table.pop(entry.adapter.name)

    def _tell_state(self) -> None:
        entries = (*self._table.values(), *self._retired)
        self._emit(
            AdaptersResident(
                model=self._model,
                adapters=len(entries),
                bytes=sum(entry.adapter.bytes for entry in entries),
            )
        )

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            self._unpin(entry)


async def _outcome(future: Future[_Entry], name: str, timeout_s: float | None) -> _Entry:
    """Wait without ever cancelling: others may wait for the same."""
    waiting = asyncio.wrap_future(future)
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen
    done, _ = await asyncio.wait({waiting}, timeout=timeout_s)
    if not done:
        raise Timeout(
            f"The deadline passed while the adapter {name!r} was being loaded.",
            details={"phase": "adapter"},
        )
    if waiting.cancelled():
        raise Unavailable("The engine is stopping.", retry_after=1)
    return waiting.result()


def _mb(size: int) -> str:
    return f"{size / 2**20:.1f} MB"
