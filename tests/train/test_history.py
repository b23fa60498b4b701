"""metrics.jsonl: nothing lost before a checkpoint, nothing twice after a resume."""

from __future__ import annotations

import json
import math
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import history
from train.events import Reported


def at(step: int, value: float = 0.0) -> Reported:
    return Reported(step=step, metrics={"loss": value}, time=1.0, total=9)


def write(out: Path, *steps: int, value: float = 0.0) -> None:
    with closing(history.Writer(out)) as writer:
        for step in steps:
            writer.append(at(step, value))


def steps(out: Path) -> list[int]:
    return [report.step for report in history.read(out)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert history.read(tmp_path) == []
    write(tmp_path, 0, 1, 2, value=0.25)
    assert history.read(tmp_path) == [at(0, 0.25), at(1, 0.25), at(2, 0.25)]


@given(
    st.dictionaries(st.text(max_size=5), st.floats(width=32)),
    st.integers(0, 10**12),
    st.one_of(st.none(), st.integers(1, 10**12)),
)
def test_a_line_is_json_and_says_everything(
    metrics: dict[str, float], step: int, total: int | None
) -> None:
    report = Reported(step=step, metrics=metrics, time=12.5, total=total)
    line = history.encode(report)
    assert line.count("\n") == 1
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    again = history.decode(line)
    assert (again.step, again.total, again.time) == (step, total, 12.5)
    assert again.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        back = again.metrics[name]
        assert back == value if math.isfinite(value) else math.isnan(back)


def test_a_line_cut_short_by_a_crash_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    with (tmp_path / history.NAME).open("a") as file:
        file.write('{"step": 3, "tot')
    assert steps(tmp_path) == [1, 2]
    history.cut(tmp_path, 1)
    assert steps(tmp_path) == [1]


def test_going_back_cuts_what_came_later(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4)
    write(tmp_path, 3, 4, 5, value=7.0)
    assert [(each.step, each.metrics["loss"]) for each in history.read(tmp_path)] == [
        (1, 0.0),
        (2, 0.0),
        (3, 7.0),
        (4, 7.0),
        (5, 7.0),
    ]


def test_a_follower_hears_each_step_once_across_a_restart(tmp_path: Path) -> None:
    heard: list[int] = []
    with history.followed(tmp_path, lambda report: heard.append(report.step), every_s=0.01):
        write(tmp_path, 0, 1, 2, 3)
        _wait(lambda: heard == [0, 1, 2, 3])
        history.cut(tmp_path, 1)
        write(tmp_path, 2, 3, 4)
        _wait(lambda: heard == [0, 1, 2, 3, 4])
        write(tmp_path, 5)  # just before the end
    assert heard == [0, 1, 2, 3, 4, 5]


def test_a_follower_begins_after_the_checkpoint(tmp_path: Path) -> None:
    heard: list[int] = []
    write(tmp_path, 1, 2, 3)
    with history.followed(tmp_path, lambda report: heard.append(report.step), after=2):
        pass
    assert heard == [3]


def test_a_follower_takes_whole_lines_only(tmp_path: Path) -> None:
    reader = history.Reader(tmp_path)
    assert list(reader.new()) == []
    line = history.encode(at(1))
    with (tmp_path / history.NAME).open("a") as file:
        file.write(line[:10])
        file.flush()
        assert list(reader.new()) == []
        file.write(line[10:])
        file.flush()
        assert list(reader.new()) == [at(1)]


def test_what_a_listener_raises_is_raised(tmp_path: Path) -> None:
    def stop(report: Reported) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"), history.followed(tmp_path, stop):
        write(tmp_path, 1)


def _wait(condition: object) -> None:
    until = time.monotonic() + 5
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.005)
