"""Data sets of the Hugging Face hub as folders of text.

The first documents of a shuffled stream are written to the cache once, as lines of JSON; from there any window can be
drawn at random and a training resumes without reading the stream again. Nothing holds more than one document and the
shuffle's buffer.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from lococo.cached import cached_folder
from lococo.errors import ArgumentError, DocumentError

PREFIX = "hf:"

# Documents among which the stream is shuffled; its shards are shuffled whole.
SHUFFLE_BUFFER = 1000

# Where the hub keeps a Parquet copy of data sets that are scripts, which `datasets` no longer runs.
PARQUET_COPY = "refs/convert/parquet"

SPELLING = re.compile(r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


def fetch(source: str, *, documents: int, seed: int, skip: int = 0) -> Path:
    """Return the folder with a data set's documents, fetched the first time.

    Args:
        source: "hf:owner/name", "hf:owner/name:subset", either with "@revision" behind it.
        documents: How many are taken at most.
        seed: Of the shuffle.
        skip: Documents of the shuffled stream before the first that is taken.

    Raises:
        ArgumentError: If `source` is spelt otherwise, or `datasets` is not installed.
        DocumentError: If it cannot be fetched, or has no field `text`.
    """
    spelt = SPELLING.fullmatch(source)
    if spelt is None:
        raise ArgumentError(f"expected a data set such as hf:owner/name or hf:owner/name:subset, got {source!r}")
    part = spelt["subset"] or "all"
    key = hashlib.sha256(f"{source}\0{documents}\0{seed}\0{skip}".encode()).hexdigest()[:16]

    def fill(folder: Path, work: Path) -> None:
        stream = _stream(spelt["name"], spelt["subset"], spelt["revision"], seed, source)
        with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
            for text in _texts(islice(stream, skip, None), documents, source):
                file.write(json.dumps({"text": text}) + "\n")
        if not (folder / "train.jsonl").stat().st_size:
            raise DocumentError(f"{source} has no documents{f' beyond the first {skip:,}' if skip else ''}")

    return cached_folder(f"{spelt['name'].replace('/', '--')}-{part}-{key}", f"fetching {source}", fill)


def _stream(name: str, subset: str | None, revision: str | None, seed: int, source: str) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ArgumentError(f"--data {source} needs datasets; install `lococo[train]`") from error
    try:
        try:
            found = datasets.load_dataset(name, subset, split="train", streaming=True, revision=revision)
        except RuntimeError as error:
            if revision is not None or "script" not in str(error):
                raise
            found = datasets.load_dataset(name, subset, split="train", streaming=True, revision=PARQUET_COPY)
    except Exception as error:
        raise DocumentError(
            f"{source} could not be opened: {error}; look for its name and subsets on the hub"
        ) from error
    shuffled: Iterable[dict[str, Any]] = found.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return shuffled


def _texts(stream: Iterable[dict[str, Any]], documents: int, source: str) -> Iterable[str]:
    rows = iter(stream)
    for _ in range(documents):
        try:
            row = next(rows, None)
        except Exception as error:
            raise DocumentError(f"{source} could not be read to its end: {error}; try again") from error
        if row is None:
            return
        text = row.get("text")
        if not isinstance(text, str):
            raise DocumentError(f"{source}: expected documents with a field 'text', found {', '.join(row)}")
        yield text
