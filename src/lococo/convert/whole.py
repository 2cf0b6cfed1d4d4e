"""Folders that are complete or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lococo.errors import ArgumentError

# Part of a name that a person sees when something went wrong, so it says what that is.
UNFINISHED: Final = ".half-converted"


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside the target, which takes the target's name once it is whole.

    A process that is killed leaves the folder under its other name, which then stands in the way of the next attempt:
    whether its maker is dead or at work cannot be told from outside, so a person must decide.

    Args:
        target: The folder to make.

    Raises:
        ArgumentError: If there is one of that name, or a half-converted one.
        OSError: If it cannot be written.
    """
    check_absent(target)
    work = unfinished(target)
    work.mkdir()
    try:
        yield work
        _sync(work)
        check_absent(target, or_half=False)  # renaming would replace an empty folder
        os.rename(work, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def unfinished(target: Path) -> Path:
    """Return what a folder is called while it is filled."""
    return target.with_name(target.name + UNFINISHED)


def check_absent(target: Path, *, or_half: bool = True) -> None:
    """Refuse a target that exists, or that was begun.

    Raises:
        ArgumentError: Names it.
    """
    if os.path.lexists(target):
        raise ArgumentError(f"{target} exists already; name another folder, or delete it")
    if or_half and os.path.lexists(work := unfinished(target)):
        raise ArgumentError(
            f"{work} is half-converted: a conversion to {target} was stopped there, or is still running; "
            "delete it if none is, and try again"
        )


def check_finished(source: Path) -> None:
    """Refuse a folder to read from that is no folder, or that was never finished.

    Raises:
        ArgumentError: Names it.
    """
    if source.name.endswith(UNFINISHED):
        raise ArgumentError(
            f"{source} is half-converted: the conversion that made it was stopped; delete it, and convert again"
        )
    if not source.is_dir():
        found = "is a file" if source.exists() else "does not exist"
        raise ArgumentError(f"{source} {found}; expected a folder with a checkpoint")


def _sync(folder: Path) -> None:
    """Put a folder's list of names on the disk; systems that cannot open folders do without."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
