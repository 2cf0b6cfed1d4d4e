from pathlib import Path

import pytest

from lococo.errors import ArgumentError
from lococo.files import check_not_input, check_output


def test_devices_are_not_replaced():
    with pytest.raises(ArgumentError, match="/dev/null is a device"):
        check_output(Path("/dev/null"), force=True)


def test_a_document_is_not_overwritten(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("text")
    with pytest.raises(ArgumentError, match="is a document that is read"):
        check_not_input(tmp_path / "." / "book.txt", ["-", str(book)])
    check_not_input(tmp_path / "other.safetensors", [str(book)])
