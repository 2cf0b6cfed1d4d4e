"""One file of all results in a folder: HTML that needs nothing beside it, or its tables in Markdown."""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from lococo.errors import ArgumentError, DocumentError
from lococo.eval import plots
from lococo.eval.sections import Section, sections
from lococo.results import ABOUT, Row


@dataclass(frozen=True)
class Part:
    """A section of the report.

    Attributes:
        file: Whose rows it shows, below the folder that was named.
        section: What it shows of them.
        picture: As HTML.
        commands: That made the rows.
        versions: Of what ran, in words.
    """

    file: str
    section: Section
    picture: str
    commands: list[str]
    versions: list[str]


def report(sources: Sequence[Path], *, baseline: str = plots.FULL, form: Literal["html", "md"] = "html") -> str:
    """Return the report of files of rows.

    Args:
        sources: .jsonl files, and folders of them.
        baseline: The compressor that others are compared with, paired.
        form: html, with pictures; md for Markdown, the tables alone.

    Raises:
        ArgumentError: If no row is of the baseline.
        DocumentError: If there is no file, or one holds something else than rows.
    """
    files: dict[Path, str] = {}
    for source in sources:
        some = (
            {source: source.name}
            if source.is_file()
            else {file: str(file.relative_to(source)) for file in sorted(source.rglob("*.jsonl"))}
        )
        if not some:
            raise DocumentError(
                f"no results in {source}; expected a .jsonl file of `lococo eval`, `ablate` or `bench`, or a folder "
                "of such files"
            )
        files |= some
    rows = {file: _rows(file) for file in files}
    named = {str(row["compressor"]) for some in rows.values() for row in some if "compressor" in row} | {plots.FULL}
    if baseline not in named:
        nearest = difflib.get_close_matches(baseline, named, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ArgumentError(f"no result is of {baseline!r}; expected one of {', '.join(sorted(named))}{hint}")
    parts = sorted(
        (part for file, name in files.items() for part in _checked(file, rows[file], name, baseline, form == "html")),
        key=lambda part: part.section.rank,
    )
    if not parts:
        raise DocumentError(f"{', '.join(map(str, files))}: no rows of `lococo eval`, `ablate` or `bench`")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lococo.eval", "."),
        autoescape=form == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    return environment.get_template(f"report.{form}.jinja").render(parts=parts, baseline=baseline)


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, within one cell of a table."""
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("_", "\\_"), ("`", "\\`")):
        text = text.replace(sign, written)
    return " ".join(text.split())


def _checked(file: Path, rows: list[Row], name: str, baseline: str, drawn: bool) -> list[Part]:
    """Return the parts of a file.

    Raises:
        DocumentError: If its rows are not as the commands write them.
    """
    try:
        return list(_parts(rows, name, baseline, drawn))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"holds something else than was expected ({error})"
        raise DocumentError(
            f"{file}: a row {what}; expected rows as `lococo eval`, `ablate` or `bench` write them"
        ) from error


def _parts(rows: list[Row], name: str, baseline: str, drawn: bool) -> Iterator[Part]:
    about = [row[ABOUT] for row in rows if ABOUT in row]
    commands = list(dict.fromkeys(each["command"] for each in about))
    versions = list(dict.fromkeys(", ".join(f"{k} {v}" for k, v in each["versions"].items()) for each in about))
    for number, section in enumerate(sections(rows, baseline)):
        picture = "" if section.picture is None or not drawn else plots.svg(section.picture(), f"{name}{number}")
        yield Part(name, section, picture, commands, versions)


def _rows(file: Path) -> list[Row]:
    rows: list[Any] = []
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DocumentError(f"{file}, line {number}: expected a row of results in JSON; {error}") from error
        if not isinstance(rows[-1], dict):
            raise DocumentError(f"{file}, line {number}: expected a row of results in JSON, got {line:.80}")
    return rows
