"""``metrics.jsonl``: every report of a run, one a line.

Written by the first worker, in its own process and before the checkpoint of the same step:
so a checkpoint never knows of a step that the history lacks, whichever process is killed
and when. What a killed attempt had reported after its last checkpoint is cut off when the
run goes on, and reported again.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from train.disk import write_text
from train.events import Reported

NAME = "metrics.jsonl"


def encode(report: Reported) -> str:
    """One line. What is not finite becomes null: JSON has no NaN."""
    row = {
        "step": report.step,
        "total": report.total,
        "time": report.time,
        "metrics": {k: v if math.isfinite(v) else None for k, v in report.metrics.items()},
    }
    return json.dumps(row) + "\n"


def decode(line: str) -> Reported:
    row = json.loads(line)
    metrics = {k: math.nan if v is None else v for k, v in row["metrics"].items()}
    return Reported(step=row["step"], total=row["total"], time=row["time"], metrics=metrics)


def read(out: Path) -> list[Reported]:
    """All that the run in ``out`` has reported, but for a line that a crash cut short."""
    try:
        lines = (out / NAME).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [decode(line) for line in lines if line.endswith("\n")]


def cut(out: Path, step: int) -> None:
    """Forget what came after ``step``."""
    kept = [report for report in read(out) if report.step <= step]
    write_text(out / NAME, "".join(map(encode, kept)))


class Writer:
    """Appends to the history of the run in ``out``; going back cuts what came later."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._last = max((report.step for report in read(out)), default=-1)
        self._file = (out / NAME).open("a")

    def append(self, report: Reported) -> None:
        if report.step <= self._last:
            self._file.close()
            cut(self._out, report.step - 1)
            self._file = (self._out / NAME).open("a")
        self._last = report.step
        self._file.write(encode(report))
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Reader:
    """Reads on where it stopped, while another process writes."""

    def __init__(self, out: Path) -> None:
        self._path = out / NAME
        self._inode = self._offset = 0

    def new(self) -> Iterator[Reported]:
        """What was written since; from the beginning if the file was cut."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        yield from map(decode, whole.decode().splitlines())


@contextmanager
def followed(
    out: Path, emit: Callable[[Reported], None], *, after: int = -1, every_s: float = 0.3
) -> Iterator[None]:
    """While inside, tell ``emit`` of all that another process writes, each step once.

    A restarted attempt repeats steps that have been told; they are the same and are not
    told again. ``emit`` is called in one thread; what it raises ends the telling, and is
    raised on leaving.
    """
    stop = threading.Event()
    failures: list[BaseException] = []

    def tell() -> None:
        reader, last, stopping = Reader(out), after, False
        while not stopping:
            stopping = stop.wait(every_s)  # and once more when it is over
            for report in reader.new():
                if report.step > last:
                    last = report.step
                    emit(report)

    def run() -> None:
        try:
            tell()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="history", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
