"""The files that a verb reads and writes, checked before anything slow begins."""

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lococo.documents import read_text
from lococo.errors import ArgumentError, DocumentError


@dataclass(frozen=True)
class Text:
    """A text that can be read once.

    Attributes:
        pieces: Of the text.
        nbytes: Its size in UTF-8, if that is known before.
    """

    pieces: Iterable[str]
    nbytes: int | None = None


def text_of(names: list[str]) -> Text:
    """Open documents, to be read one after the other; several of them with their names as headings.

    The first piece of each is read now, so that a file that is missing, empty or binary is refused at once. It is kept,
    because a pipe cannot be read twice.

    Args:
        names: Paths, or "-" for standard input.

    Raises:
        ArgumentError: If standard input is named twice.
        DocumentError: If one of them cannot be read as text.
    """
    if names.count("-") > 1:
        raise ArgumentError("standard input can be read only once, but `-` is named twice; drop one")
    opened = [_begun(name) for name in names]
    if len(names) > 1:
        between = ["", *["\n\n"] * (len(names) - 1)]
        opened = [
            chain([f"{gap}# {'standard input' if name == '-' else name}\n\n"], pieces)
            for gap, name, pieces in zip(between, names, opened, strict=True)
        ]
    sizes = [_text_size(name) for name in names]
    return Text(chain.from_iterable(opened), None if None in sizes else sum(size or 0 for size in sizes))


def _begun(name: str) -> Iterator[str]:
    pieces = read_text(name)
    return chain([next(pieces)], pieces)


def _text_size(name: str) -> int | None:
    """Return the size of a file of plain text; None for a pipe, and where the text is dug out of something else."""
    path = Path(name).expanduser()
    if name == "-" or path.suffix.lower() in (".html", ".htm", ".pdf") or not path.is_file():
        return None
    return path.stat().st_size


def check_exists(path: Path, what: str) -> None:
    """Refuse an input file that is not there.

    Raises:
        DocumentError: Names the file and what was expected.
    """
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise DocumentError(f"{path} {found}; expected {what}")


def check_not_input(path: Path, names: list[str]) -> None:
    """Refuse an output file that is also read.

    Raises:
        ArgumentError: Names the file.
    """
    for name in names:
        source = Path(name).expanduser()
        if name != "-" and path.exists() and source.exists() and path.samefile(source):
            raise ArgumentError(f"{path} is a document that is read, and would be lost; write to another file")


def check_output(path: Path, *, force: bool = False) -> None:
    """Refuse an output file that could not be written, or would replace another.

    Args:
        path: The file to be made.
        force: Let it replace an older one.

    Raises:
        ArgumentError: If it exists and may not be replaced.
        OSError: If its folder is missing or cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", str(path))
    if path.exists() and not path.is_file():
        raise ArgumentError(f"{path} is a device or a pipe, which moving a file into place would replace; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder; make it first", str(path.parent))
    if path.exists() and not force:
        raise ArgumentError(f"{path} exists already; choose another name, or replace it with --force")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written; choose another", str(path.parent))


def output_file(name: str) -> Path:
    """Return the path of a file to be made, which may replace an older one; raises what `check_output` does."""
    path = Path(name).expanduser()
    check_output(path, force=True)
    return path


def output_of_texts(data: str, name: str) -> Path:
    """Return the path of a file to be made of a folder of texts.

    Raises:
        ArgumentError: If there is no such folder, or the file may not be replaced.
        OSError: If the file cannot be written.
    """
    if not Path(data).expanduser().is_dir():
        raise ArgumentError(f"--data {data}: no such folder; expected one with a subfolder per domain")
    return output_file(name)


def training_folder(output: str, data: Iterable[str], *, file: str, what: str) -> Path:
    """Return the folder that a training fills, from the sources it reads.

    Args:
        output: The folder.
        data: Folders of text, and data sets of the hub.
        file: That is there once a training has ended.
        what: It holds, in words.

    Raises:
        ArgumentError: If a source is missing, or the folder may not be filled.
    """
    for source in data:
        if not source.startswith("hf:") and not Path(source).expanduser().is_dir():
            raise ArgumentError(f"--data {source}: no such folder; expected one with text files, or hf:owner/name")
    target = Path(output).expanduser()
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"--output {output} is a file; name a folder")
    if (target / file).exists():
        raise ArgumentError(f"--output {output} holds {what} already; name another folder, or delete it")
    return target
