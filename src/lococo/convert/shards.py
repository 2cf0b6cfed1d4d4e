"""Safetensors files as they lie on disk: a header, and the bytes of all tensors behind it, without gaps.

A conversion that renames tensors, or cuts them along their first dimension, leaves those bytes where they are. So only
headers are read into memory here, and the rest is copied through a small buffer, whatever the size of a shard.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

from lococo.errors import FileFormatError

BUFFER_NBYTES: Final = 4 << 20
LENGTH_NBYTES: Final = 8  # of the number in front of the header
MAX_HEADER_NBYTES: Final = 100_000_000  # the limit of safetensors itself
ITEM_NBYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a shard.

    Attributes:
        name: Of the tensor.
        dtype: As safetensors writes it, such as BF16.
        shape: Of the tensor.
        start: Its first byte, counted from the end of the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEM_NBYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """The header of a shard.

    Attributes:
        text: Its JSON, letter by letter, with the spaces that pad it.
        places: Its tensors, in the order of their bytes.
        metadata: What else it says, in strings.
    """

    text: str
    places: tuple[TensorPlace, ...]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(place.nbytes for place in self.places)


def read_header(path: Path) -> Header:
    """Read the header of a shard, and hold it against the size of the file.

    Raises:
        FileFormatError: If the file is damaged, cut off, or holds something other than floating-point numbers.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_NBYTES), "little")
        if not 0 < length <= min(size - LENGTH_NBYTES, MAX_HEADER_NBYTES):
            raise FileFormatError(f"{path} is damaged: it has no header of safetensors; fetch the file again")
        text = file.read(length)
    header = parse_header(text, str(path))
    if (expected := LENGTH_NBYTES + length + header.nbytes) != size:
        raise FileFormatError(
            f"{path} is damaged: its header tells of {expected:,} bytes, and it has {size:,}; fetch the file again"
        )
    return header


def parse_header(text: bytes | str, what: str) -> Header:
    """Read the text of a header.

    Args:
        text: JSON.
        what: It belongs to, for the error.

    Raises:
        FileFormatError: If it is damaged, or tells of something other than floating-point numbers.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        entries: dict[str, Any] = json.loads(text)
        metadata = _strings(entries.pop("__metadata__", {}))
        spans = {name: _span(entry) for name, entry in entries.items()}
        ordered = sorted(spans.items(), key=lambda item: item[1][2:])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{what} is damaged: its header is no list of tensors; fetch the file again") from error
    places, end = [], 0
    for name, (dtype, shape, start, stop) in ordered:
        if dtype not in ITEM_NBYTES:
            raise FileFormatError(
                f"{what} holds {name} as {dtype}; expected one of {', '.join(ITEM_NBYTES)}, so take a checkpoint that "
                "is not quantised"
            )
        places.append(TensorPlace(name, dtype, shape, start))
        if start != end or stop - start != places[-1].nbytes:
            raise FileFormatError(f"{what} is damaged: {name} is not where its header says; fetch the file again")
        end = stop
    return Header(text, tuple(places), metadata)


def _span(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Return the dtype, shape, first byte and end of a tensor; ValueError or the like if its entry is unsound."""
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise ValueError(f"{entry} is no tensor")
    return dtype, tuple(shape), start, stop


def _strings(metadata: Any) -> dict[str, str]:
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise ValueError(f"{metadata} are no strings")
    return metadata


def make_header(parts: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> Header:
    """Make the header of a shard whose tensors lie one behind the other.

    Args:
        parts: Name, dtype and shape of each tensor, in order.
        metadata: What else it says.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    places, end = [], 0
    for name, dtype, shape in parts:
        place = TensorPlace(name, dtype, shape, end)
        end += place.nbytes
        places.append(place)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place.start, end]}
    text = json.dumps(entries, separators=(",", ":"))
    text += " " * (-len(text.encode()) % LENGTH_NBYTES)  # so that the tensors are aligned
    return Header(text, tuple(places), metadata)


def rewrite(
    source: Path, target: Path, header: Header, *, leave_out: Sequence[TensorPlace] = (), copied: Callable[[int], None]
) -> dict[str, bytes]:
    """Write a shard anew, with another header and without some of its tensors.

    Args:
        source: The old shard.
        target: The new one.
        header: Of the new one.
        leave_out: Places in the old one, in order.
        copied: Called with the number of bytes that were written since it was called last.

    Returns:
        The bytes of the tensors that were left out, by name.
    """
    left_out = {}
    with source.open("rb") as old, _new_shard(target, header) as new:
        begin = LENGTH_NBYTES + int.from_bytes(old.read(LENGTH_NBYTES), "little")
        old.seek(begin)
        for place in leave_out:
            _copy(old, new, begin + place.start - old.tell(), copied)
            left_out[place.name] = old.read(place.nbytes)
        _copy(old, new, None, copied)
    return left_out


def restore(
    source: Path,
    target: Path,
    header: Header,
    *,
    put_in: Sequence[tuple[TensorPlace, bytes]],
    copied: Callable[[int], None],
) -> None:
    """Undo `rewrite`.

    Args:
        source: What it wrote.
        target: The new shard.
        header: Of the shard that it was given.
        put_in: Places in that shard, in order, and the bytes that were left out of it there.
        copied: Called with the number of bytes that were written since it was called last.
    """
    with source.open("rb") as old, _new_shard(target, header) as new:
        old.seek(LENGTH_NBYTES + int.from_bytes(old.read(LENGTH_NBYTES), "little"))
        begin = new.tell()
        for place, data in put_in:
            _copy(old, new, begin + place.start - new.tell(), copied)
            new.write(data)
        _copy(old, new, None, copied)


@contextmanager
def _new_shard(path: Path, header: Header) -> Iterator[BinaryIO]:
    text = header.text.encode()
    with path.open("xb") as file:
        file.write(len(text).to_bytes(LENGTH_NBYTES, "little") + text)
        yield file
        file.flush()
        os.fsync(file.fileno())


def _copy(old: BinaryIO, new: BinaryIO, nbytes: int | None, copied: Callable[[int], None]) -> None:
    """Copy so many bytes, or all that are left."""
    while nbytes != 0 and (data := old.read(BUFFER_NBYTES if nbytes is None else min(nbytes, BUFFER_NBYTES))):
        new.write(data)
        copied(len(data))
        if nbytes is not None:
            nbytes -= len(data)
