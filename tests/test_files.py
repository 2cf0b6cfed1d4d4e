import contextlib
import json
from pathlib import Path

import pytest

from lococo.errors import ArgumentError
from lococo.files import check_not_input, check_output, rows_file


def test_devices_are_not_replaced():
    with pytest.raises(ArgumentError, match="/dev/null is a device"):
        check_output(Path("/dev/null"), force=True)


def test_a_document_is_not_overwritten(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("text")
    with pytest.raises(ArgumentError, match="is a document that is read"):
        check_not_input(tmp_path / "." / "book.txt", ["-", str(book)])
    check_not_input(tmp_path / "other.safetensors", [str(book)])


def test_rows_take_the_place_of_the_target_when_all_are_there(tmp_path):
    target = tmp_path / "rows.jsonl"
    target.write_text("older")
    with rows_file(target) as write:
        write({"a": 1})
        assert target.read_text() == "older"
        assert json.loads((tmp_path / "rows.jsonl.partial").read_text()) == {"a": 1}
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("rows", [0, 1])
def test_an_interruption_keeps_the_older_result_and_what_was_done(rows, tmp_path):
    target = tmp_path / "rows.jsonl"
    target.write_text("older")
    with contextlib.suppress(KeyboardInterrupt), rows_file(target) as write:
        for _ in range(rows):
            write({"a": 1})
        raise KeyboardInterrupt
    assert target.read_text() == "older"
    assert (tmp_path / "rows.jsonl.partial").exists() == bool(rows)
