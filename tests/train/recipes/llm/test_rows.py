"""Rows are recognised, checked, and named by file and line when they are bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.errors import ConfigError
from train.recipes.llm.rows import BadRow, Chat, Completion, Preference, Text, parse, read

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (CHAT | {"id": 7}, Chat),
        ({"text": "a"}, Text),
        ({"prompt": "a", "completion": "b"}, Completion),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference),
    ],
)
def test_a_row_is_recognised_by_its_keys(raw: object, kind: type) -> None:
    assert type(parse(raw)) is kind


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ([1], "a JSON list, expected an object"),
        ({"body": "x"}, "has keys body; expected messages or prompt"),
        ({"text": ""}, "text: String should have at least 1 character"),
        ({"messages": []}, "messages: Tuple should have at least 2 items"),
        ({"messages": CHAT["messages"][::-1]}, "the first message is the assistant's"),
        ({"messages": [CHAT["messages"][0]] * 2}, "no message of the assistant"),
        (
            {"messages": [CHAT["messages"][0], CHAT["messages"][1] | {"tool_calls": []}]},
            "messages.1.tool_calls: Extra inputs",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": CHAT["messages"]}, "all text or all messages"),
    ],
)
def test_a_bad_row_says_what_was_found_and_expected(raw: object, why: str) -> None:
    with pytest.raises(BadRow) as refusal:
        parse(raw)
    assert why in str(refusal.value)


def test_a_bad_row_is_named_by_file_and_line_or_skipped(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", CHAT, "\n", "{not json\n", CHAT, {"messages": "x"})
    with pytest.raises(ConfigError, match=r"a\.jsonl:3: not JSON .* data\.on_bad_row: skip"):
        read(str(file))
    rows, skipped = read(str(file), on_bad_row="skip")
    assert [row.where for row in rows] == [f"{file}:1", f"{file}:4"]
    assert [bad.where for bad in skipped] == [f"{file}:3", f"{file}:5"]


def test_nothing_but_bad_rows_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", "nope\n")
    with pytest.raises(ConfigError, match=r"no rows to train on; 1 were bad.*a\.jsonl:1"):
        read(str(file), on_bad_row="skip")


def test_parquet_folders_and_patterns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    named = {"messages": [CHAT["messages"][0] | {"name": "Ada"}, CHAT["messages"][1]]}
    parquet.write_table(pyarrow.Table.from_pylist([CHAT, named]), tmp_path / "b.parquet")
    jsonl(tmp_path / "c.jsonl", CHAT)
    (tmp_path / "ignored.csv").write_text("x")
    rows, _ = read(str(tmp_path))
    assert [row.where.rpartition("/")[2] for row in rows] == [
        "b.parquet:1",
        "b.parquet:2",
        "c.jsonl:1",
    ]
    assert isinstance(rows[1].row, Chat)
    assert rows[1].row.messages[0].name == "Ada"
    assert len(read(str(tmp_path / "*.jsonl"))[0]) == 1


def test_formats_do_not_mix_and_missing_files_are_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", CHAT, {"text": "x"})
    with pytest.raises(ConfigError, match="mixes rows of Chat and Text"):
        read(str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match="is no file, folder or pattern"):
        read(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"a\.csv is not one of \.jsonl"):
        read(str(tmp_path / "a.csv"))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (rows, _) = read(str(tmp_path / "a.txt"))
    assert [row.row for row in rows] == [Text(text="one\n\ntwo")]
