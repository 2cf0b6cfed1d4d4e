"""Learned heads on disk: a folder with `config.json` and `model.safetensors`."""

import json
import textwrap
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from lococo.atomic import write_atomically
from lococo.compressors.learned import LearnedHeads
from lococo.compressors.paper import PaperHeads
from lococo.errors import FileFormatError
from lococo.facts import ModelFacts

FORMAT_VERSION = 1

# Of heads that were trained; their gains are far from float16's limits.
WRITTEN_AS = torch.float16

# Of a training that is under way, in the folder of its heads.
CHECKPOINT = "checkpoint.safetensors"

Heads = PaperHeads | LearnedHeads

KINDS: dict[str, type[PaperHeads] | type[LearnedHeads]] = {kind.kind: kind for kind in (PaperHeads, LearnedHeads)}


def save_heads(
    heads: Heads,
    folder: Path,
    facts: ModelFacts,
    *,
    selection: str = "chunk-mass",
    training: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write heads so that `load_heads` makes the same ones again; each file is complete or absent at any moment.

    Args:
        heads: What to write.
        folder: Made if absent.
        facts: Of the model they were trained for.
        selection: The selection they were trained with, for heads that only merge.
        training: Data, steps and figures, for the reader of the config.
        dtype: Of the weights on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format_version": FORMAT_VERSION,
        "compressor": heads.kind,
        "selection": selection,
        "settings": heads.settings,
        "base_model": facts.to_dict(),
        "training": training or {},
    }
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in heads.state_dict().items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(state))
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_heads(
    folder: Path, slots_per_layer: dict[int, int], head_dim: int, facts: ModelFacts | None = None
) -> tuple[str, Heads]:
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
    config = read_config(folder)
    try:
        kind, settings, selection = KINDS[config["compressor"]], dict(config["settings"]), str(config["selection"])
        base_model = config["base_model"]
        state = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise _unreadable(folder, error) from error
    if facts is not None:
        facts.check(base_model, str(folder))
    try:
        heads = kind.of_settings(settings)
        heads.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        # torch names every weight.
        said = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise FileFormatError(
            f"{folder}/model.safetensors does not fit its config.json: {said}; take both files of one training"
        ) from error
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise FileFormatError(f"{folder}/model.safetensors has weights that are not finite; train these heads again")
    if mismatch := heads.mismatch(slots_per_layer, head_dim):
        raise FileFormatError(
            f"{folder} was made for {mismatch}; use the number of slots and the model it was made for"
        )
    return selection, heads


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of heads, whatever model they are for.

    Raises:
        FileFormatError: If it is missing, damaged or of another version.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        version = config["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"{folder} has format version {version}, this lococo reads {FORMAT_VERSION}; update lococo"
        )
    return config


def shipped_heads(facts: ModelFacts) -> Path | None:
    """Return the folder of the heads that come with the package for a model, or None."""
    for config in sorted((Path(__file__).parent.parent / "heads").glob("*/config.json")):
        recorded = read_config(config.parent)["base_model"]
        if all(recorded.get(key) == value for key, value in facts.to_dict().items() if key != "model"):
            return config.parent
    return None


def _unreadable(folder: Path, error: Exception) -> FileFormatError:
    if (folder / CHECKPOINT).exists() and not (folder / "config.json").exists():
        return FileFormatError(f"{folder} holds a training that has not ended; run the same `lococo train` once more")
    return FileFormatError(
        f"{folder} holds no readable heads (expected config.json and model.safetensors): {error!r}; save them again"
    )
