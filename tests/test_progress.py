"""Counting tokens while a text is read, and the bar on a terminal."""

import io
import sys
import time

import pytest
from transformers import DynamicCache

from lococo.progress import ReadingProgress, counting, mib, reading, resident_nbytes


def progress_of(total_bytes: int | None) -> ReadingProgress:
    return ReadingProgress(DynamicCache(), total_bytes, None, None)


def test_text_passes_through_in_slices_and_is_counted_in_bytes() -> None:
    progress = progress_of(None)
    text = "é" * 40_000
    parts = list(progress.feed([text, "abc"]))
    assert "".join(parts) == text + "abc"
    assert max(map(len, parts)) <= 1 << 14
    assert progress.bytes == 80_003


def test_the_total_is_estimated_from_the_part_that_was_encoded_and_exact_at_the_end() -> None:
    progress = progress_of(total_bytes=100)
    pieces = progress.feed(["a" * 25, "b" * 75])
    totals = []

    def lists() -> list[int]:
        return [0] * len(next(pieces))

    for _ in progress.encode(iter([lists(), [0] * 50])):
        totals.append(progress.total)
    assert totals == [100, 300]  # a quarter of the text was 25 tokens, then 75
    assert progress.total == 75


def test_without_a_size_the_total_is_known_only_at_the_end() -> None:
    progress = progress_of(None)
    totals = [progress.total for _ in progress.encode([[1], [2, 3]])]
    assert totals == [None, None]
    assert progress.total == 3


def test_nothing_is_shown_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with reading(DynamicCache(), 10) as progress:
        progress.advance(5)
    assert progress.read == 5
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_tokens_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with reading(DynamicCache(), 10) as progress:
        progress.advance(1234)
    assert "1,234 tokens" in terminal.getvalue()
    assert "all kept" in terminal.getvalue()


def test_long_work_says_a_line_a_minute_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with counting("windows") as progress:
        for done in range(1, 8):
            now += 25.0
            progress(done, 1200)
    assert capsys.readouterr().err == "3 of 1,200 windows\n6 of 1,200 windows\n"


def test_memory_of_this_process_is_plausible() -> None:
    assert 1 << 26 < resident_nbytes() < 1 << 40


@pytest.mark.parametrize(
    ("nbytes", "text"), [(512, "0 KiB"), (200 << 10, "200 KiB"), (34 << 20, "34 MiB"), (3 << 29, "1.5 GiB")]
)
def test_bytes_for_people(nbytes: int, text: str) -> None:
    assert mib(nbytes) == text
