"""Learned heads on disk: a folder with `config.json` and `model.safetensors`."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from lococo.compressors.paper import PaperHeads
from lococo.errors import FileFormatError
from lococo.facts import ModelFacts

FORMAT_VERSION = 1


def save_heads(
    heads: PaperHeads,
    folder: Path,
    facts: ModelFacts,
    *,
    selection: str = "chunk-mass",
    training: dict[str, Any] | None = None,
) -> None:
    """Write heads so that `load_heads` makes the same ones again; each file is complete or absent at any moment.

    Args:
        heads: What to write.
        folder: Made if absent.
        facts: Of the model they were trained for.
        selection: The selection they were trained with.
        training: Data, steps and figures, for the reader of the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format_version": FORMAT_VERSION,
        "merge": "lococo-paper",
        "selection": selection,
        "settings": heads.settings,
        "base_model": facts.to_dict(),
        "training": training or {},
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(state))
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_heads(
    folder: Path, slots_per_layer: dict[int, int], head_dim: int, facts: ModelFacts | None = None
) -> tuple[str, PaperHeads]:
    """Read heads.

    Args:
        folder: With `config.json` and `model.safetensors`.
        slots_per_layer: What the caller wants, by layer index.
        head_dim: Of the caller's model.
        facts: Of the caller's model, to compare all of it; None compares the shapes alone.

    Returns:
        The name of the selection they were trained with, and the heads.

    Raises:
        FileFormatError: If a file is missing or damaged, or the heads do not fit; the message names both sides.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        settings = dict(config["settings"])
        settings["slots_per_layer"] = {int(key): value for key, value in settings["slots_per_layer"].items()}
        version, selection, base_model = config["format_version"], str(config["selection"]), config["base_model"]
        fits = (settings["slots_per_layer"], settings["head_dim"]) == (slots_per_layer, head_dim)
        state = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise FileFormatError(
            f"{folder} holds no readable heads (expected config.json and model.safetensors): {error}; save them again"
        ) from error
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"{folder} has format version {version}, this lococo reads {FORMAT_VERSION}; update lococo"
        )
    if facts is not None:
        facts.check(base_model, str(folder))
    if not fits:
        raise FileFormatError(
            f"{folder} was made for head_dim {settings['head_dim']} and slots {_brief(settings['slots_per_layer'])}, "
            f"but head_dim {head_dim} and slots {_brief(slots_per_layer)} were asked for; "
            "use the number of slots and the model they were made for"
        )
    try:
        heads = PaperHeads(**settings)
        heads.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise FileFormatError(f"{folder}/model.safetensors does not fit its config.json: {error}") from error
    return selection, heads


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is complete or absent, also when the process is killed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _brief(slots_per_layer: dict[int, int]) -> str:
    counts = set(slots_per_layer.values())
    return f"{counts.pop()} in each of {len(slots_per_layer)} layers" if len(counts) == 1 else str(slots_per_layer)
