"""Contexts on disk: what a model has read, in one safetensors file, to be asked many times.

The header holds everything but tensors as JSON, so that `describe_context` reads no weights. Nothing is pickled, and
the file is written aside and moved into place, so that it is complete or absent at any moment.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo import compressors
from lococo.atomic import write_atomically
from lococo.attachment import Attachment
from lococo.cache import SlotCache
from lococo.compressors import Compressor
from lococo.errors import DocumentError, FileFormatError
from lococo.facts import ModelFacts, weights_fingerprint
from lococo.models import tokenizer_fingerprint
from lococo.slot_layer import SlotLayer
from lococo.state_layer import STATES, has_state, is_state, restore_states, states_of
from lococo.tuned import TUNED_FOR

FORMAT_VERSION = 1
KEY = "lococo_context"


@dataclass(frozen=True)
class ContextInfo:
    """What a context's header says.

    Attributes:
        path: The file.
        model: Name of the model that read it.
        compressor: Name of the compressor.
        slots_per_layer: Of the layers that hold slots.
        chunk_size: Tokens per forward pass.
        positions: "original" or "packed".
        tokens: Tokens read.
        nbytes: Size of the file.
    """

    path: Path
    model: str
    compressor: str
    slots_per_layer: list[int]
    chunk_size: int
    positions: str
    tokens: int
    nbytes: int


@dataclass(frozen=True)
class Context:
    """A context that was loaded.

    Attributes:
        cache: Goes on from where it was saved.
        token_ids: All tokens that were read, (n).
        info: Its header.
    """

    cache: SlotCache
    token_ids: Tensor
    info: ContextInfo


def save_context(
    path: str | os.PathLike[str],
    cache: SlotCache,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
) -> None:
    """Write what a cache holds, and the tokens it has read.

    Args:
        path: The file; replaced if it exists.
        cache: Of one or more rows.
        model: That read it.
        tokenizer: That made the ids.
        token_ids: What was read.
    """
    tensors: dict[str, Tensor] = {"token_ids": torch.as_tensor(list(token_ids), dtype=torch.int32)}
    for i, layer in enumerate(cache.layers):
        if not getattr(layer, "is_initialized", False):
            continue
        names = SlotLayer.row_tensors if isinstance(layer, SlotLayer) else ("keys", "values")
        for name in names:
            tensor = getattr(layer, name)
            if tensor is not None:
                tensors[f"{i}.{name}"] = _stored(layer, name, tensor)
    for i, layer in enumerate(cache.layers):
        for name, number, state in states_of(layer):
            tensors[f"{i}.{name}.{number}"] = state.detach().cpu().contiguous()
    header = {
        "format_version": FORMAT_VERSION,
        "facts": ModelFacts.of(model).to_dict(),
        "weights": weights_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "compressor": _called(cache.compressor, model),
        "heads": compressors.fingerprint(cache.compressor),
        "slots_per_layer": cache.slots_per_layer,
        "chunk_size": cache.chunk_size,
        "positions": cache.positions,
        "rows": {name: getattr(cache.rows, name) for name in ROW_STATE},
        "layers": [_layer_state(layer) for layer in cache.layers],
    }
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata={KEY: json.dumps(header)}))


def _called(compressor: Compressor, model: PreTrainedModel) -> str:
    """Return the name by which `attach` finds a compressor again: heads that a model was tuned with move with it."""
    tuned_for = getattr(model, TUNED_FOR, None)
    if tuned_for is not None and compressors.lies_in_a_folder(compressor.name):
        return "auto" if Path(tuned_for).resolve() == Path(compressor.name) else compressor.name
    return compressor.name


# What a header holds beside its version, and of which kind.
FIELDS: dict[str, type] = {
    "facts": dict,
    "weights": str,
    "tokenizer": str,
    "compressor": str,
    "heads": str,
    "slots_per_layer": list,
    "chunk_size": int,
    "positions": str,
    "rows": dict,
    "layers": list,
}
ROW_STATE = ("seen", "tokens", "fresh", "room", "next_position", "shifted")
# Attributes of a layer beside its tensors; a sliding layer of transformers counts its columns.
# Tensors that come in the model's floating-point type.
FLOATING = ("keys", "values", "queries", "conv_states")
LAYER_STATE = ("held", "carries_mass", "scaling", "softcap", "cumulative_length")


def _layer_state(layer: Any) -> dict[str, Any]:
    state = {name: getattr(layer, name) for name in LAYER_STATE if hasattr(layer, name)}
    sinks = getattr(layer, "sinks", None)
    return state if sinks is None else state | {"sinks": sinks.tolist()}


def _stored(layer: Any, name: str, tensor: Tensor) -> Tensor:
    """Return what is worth writing of a layer's tensor: the part of the buffer that is filled."""
    tensor = tensor.detach().cpu()
    if isinstance(layer, SlotLayer) and name != "queries":
        tensor = tensor[:, :, : max(layer.filled)]
    return tensor.contiguous()


def describe_context(path: str | os.PathLike[str]) -> ContextInfo:
    """Read a context's header.

    Raises:
        DocumentError: If there is no such file.
        FileFormatError: If it is no context, or damaged.
    """
    return _info(Path(path), _header(Path(path)))


def _info(path: Path, header: dict[str, Any]) -> ContextInfo:
    return ContextInfo(
        path=path,
        model=header["facts"]["model"],
        compressor=header["compressor"],
        slots_per_layer=header["slots_per_layer"],
        chunk_size=header["chunk_size"],
        positions=header["positions"],
        tokens=max(header["rows"]["tokens"], default=0),
        nbytes=path.stat().st_size,
    )


def _header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DocumentError(f"no such file: {path}; expected a context that `lococo compress` wrote")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
        version = header["format_version"]
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FileFormatError(
            f"{path} is damaged or no context ({error}); make it again with `lococo compress`"
        ) from error
    if version != FORMAT_VERSION:
        raise FileFormatError(f"{path} has format version {version}, this lococo reads {FORMAT_VERSION}; update lococo")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(header.get(name), kind)]
    wrong += [] if wrong or isinstance(header["facts"].get("model"), str) else ["facts"]
    wrong += [] if wrong else _wrong_numbers(header)
    if wrong:
        raise FileFormatError(f"{path} is damaged: its header is wrong about {', '.join(wrong)}; make it again")
    return dict(header)


def _wrong_numbers(header: dict[str, Any]) -> list[str]:
    """Return the names of numbers in a header that no cache can have."""

    def counts(values: Any, least: int, most: int) -> bool:
        return isinstance(values, list) and all(type(value) is int and least <= value <= most for value in values)

    chunk_size, slots, rows = header["chunk_size"], header["slots_per_layer"], header["rows"]
    if not (counts(slots, 1, 1 << 31) and slots and counts([chunk_size], 1, 1 << 31)):
        return ["slots_per_layer or chunk_size"]
    most = {"tokens": 1 << 62, "next_position": 1 << 62, "shifted": 1 << 62}
    first_room = min(slots) + chunk_size
    wrong = [name for name in ROW_STATE[1:] if not counts(rows.get(name), 0, most.get(name, first_room))]
    if wrong or not counts([rows.get("seen")], 0, 1 << 62) or len({len(rows[name]) for name in ROW_STATE[1:]}) != 1:
        return [*wrong, "rows"]
    sums = {fresh + room for fresh, room in zip(rows["fresh"], rows["room"], strict=True)}
    return [] if sums <= {first_room, chunk_size} else ["rows"]


def load_context(path: str | os.PathLike[str], attachment: Attachment, tokenizer: PreTrainedTokenizerBase) -> Context:
    """Read a context, to go on from it.

    Args:
        path: The file.
        attachment: With the compressor, slots, chunk and positions of the file's header.
        tokenizer: The same one that made the ids.

    Raises:
        DocumentError: If there is no such file.
        FileFormatError: If it is damaged, or of another model, tokenizer or setting; the message names both sides.
    """
    path = Path(path)
    header = _header(path)
    attachment.facts.check(header["facts"], str(path))
    if (weights := weights_fingerprint(attachment.model)) != header["weights"]:
        raise FileFormatError(
            f"{path} was made with other weights ({header['facts'].get('model')} {header['weights']}, "
            f"here {attachment.facts.model} {weights}); load it with the model that read the text"
        )
    if (fingerprint := tokenizer_fingerprint(tokenizer)) != header["tokenizer"]:
        raise FileFormatError(
            f"{path} was made with another tokenizer ({header['tokenizer']}, here {fingerprint}); "
            "load the model with the tokenizer that came with it"
        )
    cache = attachment.new_cache()
    _check_settings(path, header, cache, attachment.model)
    assert isinstance(cache, SlotCache)
    try:
        tensors = safetensors.torch.load_file(path)
        for name in ROW_STATE:
            setattr(cache.rows, name, header["rows"][name])
        for i, (layer, state) in enumerate(zip(cache.layers, header["layers"], strict=True)):
            _restore_layer(i, layer, state, tensors, attachment.model)
        return Context(cache, tensors["token_ids"], _info(path, header))
    except (
        KeyError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        safetensors.SafetensorError,
    ) as error:
        raise FileFormatError(f"{path} is damaged ({error}); make it again with `lococo compress`") from error


def _check_settings(path: Path, header: dict[str, Any], cache: Any, model: PreTrainedModel) -> None:
    settings = ("slots_per_layer", "chunk_size", "positions")
    theirs = {name: header[name] for name in ("compressor", "heads", *settings)}
    compressor = cache.compressor if isinstance(cache, SlotCache) else None
    ours: dict[str, Any] = {
        "compressor": "full" if compressor is None else _called(compressor, model),
        "heads": "" if compressor is None else compressors.fingerprint(compressor),
        **{name: getattr(cache, name, None) for name in settings},
    }
    differing = [name for name in theirs if theirs[name] != ours[name]]
    if ours["heads"] and "heads" not in differing:  # the same, wherever they lie
        differing = [name for name in differing if name != "compressor"]
    if differing:
        said = "; ".join(f"{name}: {theirs[name]} in the file, {ours[name]} here" for name in differing)
        raise FileFormatError(f"{path} was made with other settings ({said}); attach with those of the file")


def _restore_layer(
    i: int, layer: Any, state: dict[str, Any], tensors: dict[str, Tensor], model: PreTrainedModel
) -> None:
    """Fill a layer of an empty cache.

    Raises:
        ValueError: If the tensors are not those that the layer's state speaks of.
    """
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{i}.")}
    if not own:
        return
    # Read in one floating-point type and asked in another: keys, values and queries follow the model.
    own = {
        name: tensor.to(model.device, model.dtype if name.partition(".")[0] in FLOATING else None)
        for name, tensor in own.items()
    }
    if not all(bool(tensor.isfinite().all()) for tensor in own.values()):
        raise ValueError(f"layer {i} holds numbers that are not finite")
    states = {name: own.pop(name) for name in list(own) if name.partition(".")[0] in STATES}
    if has_state(layer):
        restore_states(layer, {tuple(name.split(".")): state for name, state in states.items()})
    if is_state(layer):
        return
    layer.lazy_initialization(own["keys"], own["values"])
    for name in LAYER_STATE:
        if name in state:
            setattr(layer, name, state[name])
    if not isinstance(layer, SlotLayer):
        layer.keys, layer.values = own["keys"], own["values"]
        return
    if "sinks" in state:
        layer.sinks = torch.tensor(state["sinks"], device=model.device)
    _check_layer(i, layer, own)
    for name, tensor in own.items():
        if name == "queries":
            layer.queries = tensor
        else:
            getattr(layer, name)[:, :, : tensor.shape[2]] = tensor


def _check_layer(i: int, layer: SlotLayer, own: dict[str, Tensor]) -> None:
    """Compare a slot layer's tensors with what its rows hold."""
    batch = len(layer.rows.tokens)
    if len(layer.held) != batch or not all(0 <= held <= layer.num_slots for held in layer.held):
        raise ValueError(f"layer {i} holds {layer.held} slots")
    needed = {"keys", "values", "positions", "log_mass", "token_index"} | (
        layer.compressor.observes & {"mass", "remembered", "queries"}
    )
    if needed != own.keys():
        raise ValueError(f"layer {i} has {sorted(own)}, expected {sorted(needed)}")
    heads, width = own["keys"].shape[1], max(layer.filled)
    for name, tensor in own.items():
        if name != "queries" and tensor.shape[:3] != (batch, heads, width):
            raise ValueError(f"layer {i}, {name}: {list(tensor.shape)}, expected {[batch, heads, width]}")
