"""Shards are read, rewritten and restored as safetensors itself would read them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from lococo.convert import shards
from lococo.convert.shards import TensorPlace, make_header, parse_header, read_header, restore, rewrite
from lococo.errors import FileFormatError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4.0).half(),
    "c": torch.ones(5, dtype=torch.bfloat16),
}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "old.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_the_header_says_where_everything_is(shard: Path) -> None:
    header = read_header(shard)
    assert header.metadata == {"format": "pt"}
    assert {place.name: place.shape for place in header.places} == {"a": (2, 3), "b": (4,), "c": (5,)}
    assert header.nbytes == 6 * 4 + 4 * 2 + 5 * 2
    assert len(header.text.encode()) + 8 + header.nbytes == shard.stat().st_size


@pytest.mark.parametrize("buffer", [3, 1 << 20])
@pytest.mark.parametrize("name", "abc")
def test_a_tensor_is_left_out_and_put_in_again(
    name: str, buffer: int, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BUFFER_NBYTES", buffer)
    old = read_header(shard)
    out = [place for place in old.places if place.name == name]
    parts = [(place.name.upper(), place.dtype, place.shape) for place in old.places if place.name != name]
    new, again = tmp_path / "new.safetensors", tmp_path / "again.safetensors"
    counts: list[int] = []
    left = rewrite(shard, new, make_header(parts, {}), leave_out=out, copied=counts.append)
    assert sum(counts) == old.nbytes - out[0].nbytes
    loaded = load_file(new)
    assert set(loaded) == {other.upper() for other in "abc" if other != name}
    assert all(torch.equal(loaded[key], TENSORS[key.lower()]) for key in loaded)
    restore(new, again, old, put_in=[(place, left[place.name]) for place in out], copied=counts.append)
    assert again.read_bytes() == shard.read_bytes()


def test_a_header_is_padded_so_that_tensors_are_aligned() -> None:
    for length in range(1, 20):
        assert len(make_header([("x" * length, "F32", (1,))], {}).text) % 8 == 0
    assert make_header([("a", "F16", (3,)), ("b", "F32", ())], {}).places[1] == TensorPlace("b", "F32", (), 6)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "it has no header of safetensors"),
        (b"\xff" * 200, "it has no header of safetensors"),
        ((5).to_bytes(8, "little") + b"abcde", "its header is no list of tensors"),
        ((2).to_bytes(8, "little") + b"[]", "its header is no list of tensors"),
        (save(TENSORS)[:-1], "its header tells of"),
        (save(TENSORS) + b"x", "its header tells of"),
        (save({"w": torch.ones(4, dtype=torch.int8)}), "holds w as I8; expected one of F64, F32, F16, BF16"),
    ],
)
def test_damaged_shards_are_refused(data: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=line):
        read_header(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": ["F32"]},
        {"shape": ["a", "b"]},
        {"shape": [2.0]},
        {"shape": "2"},
        {"shape": [True, 2]},
        {"shape": [-1, -2]},
        {"data_offsets": [0, 8, 8]},
        {"data_offsets": [0.0, 8.0]},
    ],
)
def test_headers_of_other_kinds_are_refused(change: dict[str, Any]) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert parse_header(json.dumps({"w": entry}), "x").places == (TensorPlace("w", "F32", (2,), 0),)
    with pytest.raises(FileFormatError, match="its header is no list of tensors"):
        parse_header(json.dumps({"w": entry | change}), "x")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"__metadata__": ["pt"]}', '{"__metadata__": {"format": {"a": "pt"}}}']
)
def test_headers_that_are_no_lists_are_refused(text: str) -> None:
    with pytest.raises(FileFormatError, match="its header is no list of tensors"):
        parse_header(text, "x")


@pytest.mark.parametrize("offsets", [[4, 12], [0, 12], [0, 4], ["0", "8"]])
def test_tensors_elsewhere_than_their_shapes_say_are_refused(offsets: list[int]) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": offsets}})
    with pytest.raises(FileFormatError, match=r"w is not where its header says|is no list of tensors"):
        parse_header(text, "x")
