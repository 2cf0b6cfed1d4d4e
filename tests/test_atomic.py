import os

import pytest

from lococo.atomic import write_atomically


def test_a_full_disk_says_which_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "heads.bin"
    write_atomically(file, b"good")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as refused:
        write_atomically(file, b"better")
    assert refused.value.filename == str(file)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("heads.bin", b"good")]
