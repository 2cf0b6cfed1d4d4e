"""Folders of text, by domain: .txt files, and .jsonl files of one document per line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lococo.documents import read_text
from lococo.errors import DocumentError
from lococo.tokenization import encode_stream

# Files that describe a corpus.
DESCRIPTIONS = ("SOURCE", "LICENSE", "README")


def domains(data: Path, part: Literal["train", "val"] = "val") -> dict[str, list[Path]]:
    """Return the .txt and .jsonl files of each domain.

    A domain is a subfolder. Where it is split into parts, folders or .jsonl files named "train" and "val", only one of
    them is taken: what was trained on says nothing about the rest. SOURCE.txt, LICENSE.txt and README.txt describe the
    data and are left out.

    Args:
        data: Folder of domains.
        part: Which part of a domain that is split.

    Raises:
        DocumentError: If there is no such folder, or no text in it.
    """
    if not data.is_dir():
        raise DocumentError(f"no such folder: {data}; expected one subfolder per domain with .txt or .jsonl files")
    found = {}
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        if files := files_of(folder, part):
            found[folder.name] = files
    if not found:
        raise DocumentError(f"{data} has no subfolder with .txt or .jsonl files; expected one subfolder per domain")
    return found


def files_of(folder: Path, part: Literal["train", "val"]) -> list[Path]:
    """Return the files of one domain; a domain without parts is all of it."""
    parts = {name: _part(folder, name) for name in ("train", "val")}
    # One that has only the other part has nothing to give.
    candidates = parts[part] if any(parts.values()) else list(folder.rglob("*"))
    return sorted(path for path in candidates if path.suffix in (".txt", ".jsonl") and path.stem not in DESCRIPTIONS)


def texts_in(folder: Path) -> list[Path]:
    """Return the .txt and .jsonl files of a folder, whatever its subfolders.

    Raises:
        DocumentError: If there are none.
    """
    if files := sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl")):
        return files
    raise DocumentError(f"{folder} holds no .txt or .jsonl file; name a folder of texts")


def is_split(folder: Path) -> bool:
    """Tell whether a folder is a domain of its own that is split into parts."""
    return any(_part(folder, name) for name in ("train", "val"))


def _part(folder: Path, name: str) -> list[Path]:
    file = folder / f"{name}.jsonl"
    return list((folder / name).rglob("*")) + ([file] if file.is_file() else [])


def windows_of(
    tokenizer: PreTrainedTokenizerBase, files: Iterable[Path], length: int, least: int
) -> Iterator[list[int]]:
    """Yield windows of at most `length` and at least `least` tokens, one per document in turn."""
    waiting = [_cut(encode_stream(tokenizer, text), length, least) for file in files for text in texts_of(file)]
    while waiting:
        going_on = []
        for document in waiting:
            window = next(document, None)
            if window is not None:
                going_on.append(document)
                yield window
        waiting = going_on


def _cut(ids: Iterator[list[int]], length: int, least: int) -> Iterator[list[int]]:
    held: list[int] = []
    for piece in ids:
        held += piece
        while len(held) >= length:
            yield held[:length]
            held = held[length:]
    if len(held) >= least:
        yield held


def texts_of(file: Path) -> Iterator[Iterator[str]]:
    """Yield the documents of a file, each as pieces of text."""
    if file.suffix == ".txt":
        if file.stat().st_size:
            yield read_text(file)
        return
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(_decoded(lines, file), 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise DocumentError(f"{file}, line {number}: expected a JSON object with a 'text' field") from error
            if not isinstance(text, str):
                raise DocumentError(f"{file}, line {number}: expected 'text' to be a string, got {type(text).__name__}")
            # JSON can spell half a surrogate pair, which no tokenizer takes.
            yield iter([text.encode("utf-8", "replace").decode()])


def _decoded(lines: Iterable[str], file: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DocumentError(f"{file} is not UTF-8 (byte {error.start} of a block); convert it with iconv") from error
