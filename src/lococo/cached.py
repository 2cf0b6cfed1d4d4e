"""Folders that are made once and kept in the user's cache: converted models, fetched data sets."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lococo.errors import ModelError

STALE_SECONDS: Final = 24 * 3600
WORK_PREFIX: Final = ".converting-"


def cache_folder() -> Path:
    """Return the folder for what is made once: $LOCOCO_CACHE, $XDG_CACHE_HOME/lococo, or ~/.cache/lococo."""
    if own := os.environ.get("LOCOCO_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lococo"


def cached_folder(key: str, what: str, fill: Callable[[Path, Path], None]) -> Path:
    """Return the cache folder `key`, filled at most once.

    Everything is written beside it and renamed at the end, so that a folder under its final name is always whole. Two
    processes that fill it at once both finish, and the one that comes second takes what the first has put there.

    Args:
        key: Its name, or names of folders below one another.
        what: What a person is told is going on, such as "converting a.gguf".
        fill: Called with the folder to fill, and one for what is needed on the way.
    """
    root = cache_folder()
    final = root / key
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=root))
    except OSError as error:
        raise ModelError(f"the cache folder {root} cannot be written ({error}); set LOCOCO_CACHE to another") from error
    if sys.stderr.isatty():
        print(f"lococo: {what} to {final}, once", file=sys.stderr)
    try:
        folder = work / "filled"
        folder.mkdir()
        fill(folder, work)
        final.parent.mkdir(parents=True, exist_ok=True)
        _publish(folder, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _publish(folder: Path, final: Path) -> None:
    try:
        os.rename(folder, final)
    except OSError:
        if not final.is_dir():
            raise


def _sweep(root: Path) -> None:
    """Remove what killed processes left; younger folders may belong to one that is at work."""
    for left in root.glob(f"{WORK_PREFIX}*"):
        try:
            old = time.time() - left.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)
