"""Rows of results in a file as they come, so that what an interrupted run has measured is not measured again."""

import hashlib
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lococo.atomic import write_atomically

Row = dict[str, Any]

# Names what a row was measured with; rows that differ in anything that could change their figures differ in it.
RUN = "run"

# Says how a row was made, in words: the command and the versions of what ran.
ABOUT = "about"
PACKAGES = ("lococo", "torch", "transformers", "lm_eval")


class Results:
    """Rows in the order in which they were asked for, backed by a file of JSON lines."""

    def __init__(self, file: Path | None = None, about: Row | None = None, *, finished: Path | None = None) -> None:
        """Open a file that may hold rows already; without one, rows are only held in memory.

        Args:
            file: Of JSON lines; need not exist.
            about: Added to every new row, see `about_this_run`.
            finished: File of an earlier run; what it has measured is taken from it.
        """
        self.rows: list[Row] = []
        self._about = {} if about is None else {ABOUT: about}
        self._file = file
        self._finished = {} if finished is None or not finished.exists() else _by_run(_rows_of(finished)[0])
        self._kept: dict[str, Row] = {}
        if file is not None and file.exists():
            rows, text = _rows_of(file)
            self._kept = _by_run(rows)
            if (readable := as_lines(rows)) != text:
                write_atomically(file, readable.encode())

    def measured(self, settings: Row, measure: Callable[[], Row], *, of: str = "") -> Row:
        """Return the row of some settings, measured now unless the file holds it.

        Args:
            settings: What is measured; they begin the row.
            measure: Returns the figures, which follow.
            of: What else the figures depend on, such as weights and text.
        """
        run = key_of({"settings": settings, "of": of})
        row = self._kept.get(run)
        if row is None:
            known = self._finished.get(run)
            row = self._kept[run] = known or {**settings, **measure(), **self._about, RUN: run}
            self._write(row)
        self.rows.append(row)
        return row

    def together(self, key: str, count: int, measure: Callable[[], list[Row]]) -> None:
        """Add the rows of what is measured as a whole, now unless all of them are known.

        Args:
            key: Names what was measured, see `key_of`.
            count: How many rows it has.
            measure: Returns them.
        """
        runs = [f"{key}-{number}" for number in range(count)]
        known = self._finished | self._kept
        if all(run in known for run in runs):
            rows = [known[run] for run in runs]
        else:
            rows = [row | self._about | {RUN: run} for run, row in zip(runs, measure(), strict=True)]
        for run, row in zip(runs, rows, strict=True):
            if self._kept.get(run) is not row:
                self._kept[run] = row
                self._write(row)
        self.rows += rows

    def add(self, row: Row) -> None:
        """Keep a row that no later run takes over."""
        row = {name: value for name, value in row.items() if name != RUN} | self._about
        self._write(row)
        self.rows.append(row)

    def unasked(self) -> list[Row]:
        """Return rows of the files that were not asked for, but may be by another run."""
        asked = {row.get(RUN) for row in self.rows}
        return [row for run, row in (self._finished | self._kept).items() if run not in asked]

    def _write(self, row: Row) -> None:
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(as_lines([row]))


@contextmanager
def results_file(target: Path) -> Iterator[Results]:
    """Yield results that become a file of JSON lines when all are there.

    They go to a file beside the target, which takes the target's place then: hours of work outlive an interruption,
    and so does an older result, of which the same rows are not measured again. Rows of either that nobody asked for
    this time stay in the file beside, for a run that asks for them.
    """
    partial = target.with_name(target.name + ".partial")
    results = Results(partial, about_this_run(), finished=target)
    yield results
    write_atomically(target, as_lines(results.rows).encode())
    if unasked := results.unasked():
        write_atomically(partial, as_lines(unasked).encode())
    else:
        partial.unlink(missing_ok=True)


def _rows_of(file: Path) -> tuple[list[Row], str]:
    """Return the rows of a file that can be read, and its text."""
    text = file.read_text("utf-8", errors="replace")
    return [row for row in map(_readable, text.splitlines()) if row is not None], text


def _by_run(rows: list[Row]) -> dict[str, Row]:
    return {row[RUN]: row for row in rows if RUN in row}


def as_lines(rows: list[Row]) -> str:
    """Return rows as a file of JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _readable(line: str) -> Row | None:
    """Return the row of a line, None for one that was cut off while it was written."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def key_of(settings: Row) -> str:
    """Return a short name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def about_this_run() -> Row:
    """Return the command that runs, with names alone of the files and folders in it, and the versions of what runs."""
    words = [_without_place(word) for word in sys.argv[1:]]
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"command": shlex.join([*_program(), *words]), "versions": versions}


def _program() -> list[str]:
    """Return what was called: lococo, or a module of it that runs by itself, such as lococo.bench.tuning."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = "" if spec is None else spec.name
    by_itself = name.startswith("lococo.") and not name.endswith("__main__")
    return ["python", "-m", name] if by_itself else ["lococo"]


def _without_place(word: str) -> str:
    """Return a word of a command, of a path on this machine its name alone."""
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if value.startswith(("~", "..")) or Path(value).is_absolute():
        value = Path(value).name
    return flag + equals + value
