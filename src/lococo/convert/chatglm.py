"""A ChatGLM checkpoint becomes a folder for GlmForCausalLM, and that folder becomes the checkpoint again.

What GLM's files cannot say is kept beside them: the small files of the checkpoint letter by letter in a subfolder, and
the headers of its shards and the tensors that were left out in one JSON file. So going back gives the same bytes.
"""

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lococo.atomic import write_atomically
from lococo.convert.family import AUTO, family_of
from lococo.convert.glm_config import glm_config, sizes_of
from lococo.convert.layout import Layout
from lococo.convert.shards import Header, make_header, parse_header, read_header, restore, rewrite
from lococo.convert.whole import check_absent, check_finished, whole_folder
from lococo.errors import ConversionError, FileFormatError

ORIGINALS: Final = "chatglm"  # the checkpoint's small files, in the converted folder
SIDECAR: Final = "chatglm.json"
FORMAT_VERSION: Final = 1
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
CONFIG: Final = "config.json"
WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5")
SMALL_NBYTES: Final = 64 << 20  # a tokenizer of a million words is smaller

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        path: The folder that was made.
        family: Of the checkpoint.
        shards: Files of weights.
        nbytes: Of all tensors.
        config: Of the folder that was made.
    """

    path: Path
    family: str
    shards: int
    nbytes: int
    config: dict[str, Any]


def convert(source: Path, target: Path, *, family: str = AUTO, progress: Progress | None = None) -> Conversion:
    """Make a folder for GlmForCausalLM of a ChatGLM checkpoint.

    Args:
        source: The checkpoint: config.json, safetensors, tokenizer.model.
        target: The folder to make; it is complete or absent.
        family: A name in `family.FAMILIES`, or auto.
        progress: Called with the bytes that are written, and all there are.

    Raises:
        ConversionError: If it is no ChatGLM checkpoint, or one that GLM's classes cannot stand for.
        FileFormatError: If a file of it is damaged.
        ArgumentError: If the target exists.
    """
    check_finished(source)
    check_absent(target)
    config = read_json(source / CONFIG)
    sizes = sizes_of(config)
    found = family_of(source, config, family)
    made = glm_config(config, sizes, found)
    layout = Layout(sizes)
    headers = {name: read_header(source / name) for name in _shard_names(source)}
    layout.check((name, place) for name, header in headers.items() for place in header.places)
    from lococo.convert.tokenizer import glm_tokenizer, stops_of

    tokenizer = glm_tokenizer(source, found.name, sizes.vocab_size)
    counter = _Counter(progress, sum(header.nbytes for header in headers.values()))
    with whole_folder(target) as work:
        left_out = {}
        for name, header in headers.items():
            left_out[name] = rewrite(
                source / name,
                work / name,
                _glm_header(header, layout),
                leave_out=[place for place in header.places if not layout.parts[place.name]],
                copied=counter,
            )
        if list(headers) != [SINGLE]:
            write_json(work / INDEX, _index(headers, layout))
        _copy_small(source, work / ORIGINALS)
        tokenizer.save_pretrained(work)
        write_json(work / "generation_config.json", stops_of(tokenizer, made))
        write_json(work / SIDECAR, _sidecar(headers, left_out, found.name))
        write_json(work / CONFIG, made)
    return Conversion(target, found.name, len(headers), counter.total, made)


def convert_back(source: Path, target: Path, *, progress: Progress | None = None) -> Conversion:
    """Make the ChatGLM checkpoint again of which `convert` made a folder.

    Args:
        source: That folder.
        target: The folder to make; it is complete or absent.
        progress: Called with the bytes that are written, and all there are.

    Raises:
        ConversionError: If the folder is none that `convert` made, or its weights were saved anew.
        FileFormatError: If a file of it is damaged.
        ArgumentError: If the target exists.
    """
    check_finished(source)
    check_absent(target)
    if not (source / SIDECAR).is_file():
        raise ConversionError(
            f"{source} has no {SIDECAR}, which `lococo convert` writes; expected a folder that it made of a checkpoint"
        )
    family, headers, left_out = _read_sidecar(source / SIDECAR)
    config = read_json(source / ORIGINALS / CONFIG)
    layout = Layout(sizes_of(config))
    layout.check((name, place) for name, header in headers.items() for place in header.places)
    for name, header in headers.items():
        _check_same(source / name, _glm_header(header, layout))
    counter = _Counter(progress, sum(header.nbytes for header in headers.values()))
    with whole_folder(target) as work:
        shutil.copytree(source / ORIGINALS, work, dirs_exist_ok=True)
        for name, header in headers.items():
            put_in = [(place, left_out[name][place.name]) for place in header.places if not layout.parts[place.name]]
            restore(source / name, work / name, header, put_in=put_in, copied=counter)
    return Conversion(target, family, len(headers), counter.total, config)


class _Counter:
    """Adds up the bytes that were written, and tells."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)


def _shard_names(source: Path) -> list[str]:
    """Return the names of a checkpoint's shards, in order."""
    if (source / INDEX).is_file():
        index = read_json(source / INDEX).get("weight_map")
        found = list(index.values()) if type(index) is dict else []
        if not found or any(type(name) is not str or name in ("", "..") or Path(name).name != name for name in found):
            raise FileFormatError(f"{source / INDEX} names no shards in its own folder; fetch the file again")
        names = sorted(set(found))
        if missing := [name for name in names if not (source / name).is_file()]:
            raise ConversionError(
                f"{source} lacks {len(missing)} of {len(names)} shards ({missing[0]}, ...); fetch them, and try again"
            )
        return names
    if (source / SINGLE).is_file():
        return [SINGLE]
    if pickled := sorted(path.name for path in source.glob("*.bin")):
        raise ConversionError(
            f"{source} holds pickled weights alone ({pickled[0]}); reading those can run any code, so lococo never "
            "does: fetch the model's safetensors"
        )
    raise ConversionError(f"{source} holds no weights; expected {INDEX} with its shards, or {SINGLE}")


def _glm_header(header: Header, layout: Layout) -> Header:
    """Return the header of the shard that one of ChatGLM's becomes."""
    parts = ((name, place.dtype, shape) for place in header.places for name, shape in layout.parts[place.name])
    return make_header(parts, {"format": "pt"} | header.metadata)  # transformers asks for a format


def _check_same(path: Path, expected: Header) -> None:
    """Refuse a shard that is laid out otherwise than `convert` did."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing; expected all shards that `lococo convert` wrote")
    if read_header(path).places != expected.places:
        raise ConversionError(
            f"{path} was saved anew, with other tensors or in another order; expected what `lococo convert` wrote there"
        )


def _index(headers: dict[str, Header], layout: Layout) -> dict[str, Any]:
    """Return what tells transformers which shard a tensor is in."""
    made = {name: _glm_header(header, layout) for name, header in headers.items()}
    return {
        "metadata": {"total_size": sum(header.nbytes for header in made.values())},
        "weight_map": {place.name: name for name, header in made.items() for place in header.places},
    }


def _sidecar(headers: dict[str, Header], left_out: dict[str, dict[str, bytes]], family: str) -> dict[str, Any]:
    """Return what is needed to go back, beside the small files."""
    shards = {
        name: {
            "header": header.text,
            "left_out": {key: base64.b64encode(data).decode() for key, data in left_out[name].items()},
        }
        for name, header in headers.items()
    }
    return {"format_version": FORMAT_VERSION, "family": family, "shards": shards}


def _read_sidecar(path: Path) -> tuple[str, dict[str, Header], dict[str, dict[str, bytes]]]:
    """Return what `_sidecar` was given: the family, headers, and the tensors that were left out."""
    sidecar = read_json(path)
    if (version := sidecar.get("format_version")) != FORMAT_VERSION:
        raise FileFormatError(f"{path} is of format {version}; expected {FORMAT_VERSION}: use the lococo that made it")
    try:
        shards = sidecar["shards"]
        headers = {name: parse_header(kept["header"], str(path)) for name, kept in shards.items()}
        left_out = {
            name: {key: base64.b64decode(data) for key, data in kept["left_out"].items()}
            for name, kept in shards.items()
        }
        family = str(sidecar["family"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileFormatError(f"{path} is damaged; convert the checkpoint again") from error
    return family, headers, left_out


def _small_files(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.suffix not in WEIGHTS and path.stat().st_size <= SMALL_NBYTES:
            yield path


def _copy_small(source: Path, target: Path) -> None:
    target.mkdir()
    for path in _small_files(source):
        shutil.copyfile(path, target / path.name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ConversionError: If it is missing.
        FileFormatError: If it is no such file.
    """
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; expected a whole checkpoint, with that file")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise FileFormatError(f"{path} is no JSON ({error}); fetch the file again") from error
    if type(value) is not dict:
        raise FileFormatError(f"{path} is a JSON {type(value).__name__}; expected an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file for people as well."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
