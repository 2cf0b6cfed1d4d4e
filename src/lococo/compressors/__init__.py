"""The table of compressors: selections, merges, and the names that stand for a pair of them."""

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lococo.compressors import selections
from lococo.compressors.base import Compressor, Drop, Merge, Selection, SelectMerge
from lococo.compressors.heads import Heads, load_heads, shipped_heads
from lococo.compressors.learned import LearnedHeads
from lococo.compressors.mass_merge import MassMerge
from lococo.compressors.paper import PaperHeads
from lococo.errors import ArgumentError, FileFormatError
from lococo.facts import ModelFacts

__all__ = ["COMPRESSORS", "Compressor", "Drop", "MassMerge", "PaperHeads", "SelectMerge", "Selection", "Shape", "make"]


@dataclass(frozen=True)
class Shape:
    """What learned heads must fit: slots by layer index, the size of a key, and the model where it is known."""

    slots_per_layer: dict[int, int]
    head_dim: int
    facts: ModelFacts | None = None


# Raised whenever the compressors of this table do something else than before under the same name, so that what was
# measured with them is measured again. Heads have a `revision` of their own.
METHODS = 3

QUERIES = frozenset({"queries"})

SELECTIONS: dict[str, Selection] = {
    "streaming-llm": Selection(selections.recency, sinks=4),
    "h2o": Selection(selections.accumulated_mass, frozenset({"mass"}), recent=None),
    "tova": Selection(selections.last_query_mass, QUERIES),
    "snapkv": Selection(selections.window_mass, QUERIES, recent=32),
    "chunk-mass": Selection(selections.chunk_mass, QUERIES, recent=16),
    "look-ahead": Selection(selections.future_mass, QUERIES, recent=selections.RECENT),
}

MERGES: dict[str, Callable[[Shape], Merge]] = {
    "drop": lambda shape: Drop(),
    "mass-merge": lambda shape: MassMerge(),
    "lococo-paper": lambda shape: _untrained(shape),
}

# Names of their own for the pairs that are used most; any other pair is written "selection+merge".
PAIRS = {
    **{name: (name, "drop") for name in SELECTIONS},
    "mass-merge": ("look-ahead", "mass-merge"),
    "lococo-paper": ("chunk-mass", "lococo-paper"),
}

# Without heads for the model.
DEFAULT = "mass-merge"

# Our heads without the changes of the model's norms that were trained with them.
FROZEN = f"{LearnedHeads.kind}-frozen"

COMPRESSORS = ("full", *PAIRS, LearnedHeads.kind, FROZEN)


def make(name: str, shape: Shape) -> Compressor:
    """Make a compressor.

    Args:
        name: A name of `COMPRESSORS` other than "full", a pair "selection+merge", or a folder with saved heads.
        shape: What learned heads have to fit.

    Returns:
        The compressor.

    Raises:
        ArgumentError: If the name is unknown; the message names the nearest.
        FileFormatError: If saved heads are damaged or of another shape.
    """
    if name in (LearnedHeads.kind, FROZEN):
        heads = _saved(_shipped(shape), name, shape)
        if name == FROZEN and isinstance(heads, LearnedHeads):
            heads.norms = None
        return heads
    if name not in PAIRS and Path(name).is_dir():
        return _saved(Path(name), str(Path(name).resolve()), shape)
    check_known(name)
    selection, merge = _pair(name)
    return SelectMerge(name, SELECTIONS[selection], MERGES[merge](shape))


def _pair(name: str) -> tuple[str, str]:
    """Return the names of a selection and a merge that a name stands for."""
    selection, _, merge = ("+".join(PAIRS[name]) if name in PAIRS else name).partition("+")
    return selection, merge


def check_known(name: str) -> None:
    """Refuse what is neither the name of a compressor nor of a folder.

    Raises:
        ArgumentError: Names the nearest.
    """
    selection, merge = _pair(name)
    if name in COMPRESSORS or (selection in SELECTIONS and merge in MERGES) or Path(name).is_dir():
        return
    known = [*COMPRESSORS, *(f"{s}+{m}" for s in SELECTIONS for m in MERGES if m != "drop")]
    nearest = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "or a pair such as 'h2o+mass-merge', or a folder of heads"
    raise ArgumentError(f"unknown compressor {name!r}; expected one of {', '.join(COMPRESSORS)}; {hint}")


def default(facts: ModelFacts) -> str:
    """Return the name of the compressor that loses least for a model without training anything first."""
    return DEFAULT if shipped_heads(facts) is None else LearnedHeads.kind


def _shipped(shape: Shape) -> Path:
    """Return the folder of the heads that come with the package for this model."""
    folder = None if shape.facts is None else shipped_heads(shape.facts)
    if folder is None:
        model = "this model" if shape.facts is None else shape.facts.model
        raise ArgumentError(
            f"no heads for {model} come with lococo; train them with `lococo train --model ...`, name a folder of "
            f"heads, or use {DEFAULT!r}"
        )
    return folder


def _saved(folder: Path, name: str, shape: Shape) -> Compressor:
    """Make a compressor of heads on disk."""
    selection, heads = load_heads(folder, shape.slots_per_layer, shape.head_dim, shape.facts)
    if selection not in SELECTIONS:
        raise FileFormatError(
            f"{folder} was trained with the selection {selection!r}, which is none of {', '.join(SELECTIONS)}"
        )
    return of_heads(heads, name, selection)


def _untrained(shape: Shape) -> PaperHeads:
    """Make the paper's heads as they start, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PaperHeads(shape.slots_per_layer, shape.head_dim)


def of_heads(heads: Heads, name: str, selection: str = PAIRS[PaperHeads.kind][0]) -> Compressor:
    """Return heads as a compressor; a selection decides what stays for those that only merge."""
    if isinstance(heads, LearnedHeads):
        heads.name = name
        return heads
    return SelectMerge(name, SELECTIONS[selection], heads)


def selection_of(compressor: Compressor | str) -> str:
    """Return the name of the selection that heads are saved with, as `of_heads` takes it."""
    chosen = getattr(compressor, "selection", None)
    return next((name for name, selection in SELECTIONS.items() if selection is chosen), PAIRS[PaperHeads.kind][0])


def is_trained(name: str) -> bool:
    """Tell whether a name stands for heads that were trained, those that come with lococo or a folder of others."""
    return name in (LearnedHeads.kind, FROZEN) or (name not in PAIRS and Path(name).is_dir())


def modules(compressor: Compressor) -> list[nn.Module]:
    """Return the trainable parts of a compressor."""
    return [part for part in (compressor, getattr(compressor, "merge", None)) if isinstance(part, nn.Module)]


def lies_in_a_folder(name: str) -> bool:
    """Tell whether a compressor's name says where its heads lie."""
    return Path(name).is_absolute()


def fingerprint(compressor: Compressor) -> str:
    """Return a short hash of what was trained and of what it selects by, wherever it lies; "" where nothing was."""
    if not modules(compressor):
        return ""
    digest = hashlib.sha256(selection_of(compressor).encode())
    hash_trained(digest, compressor)
    return digest.hexdigest()[:16]


def hash_trained(digest: "hashlib._Hash", compressor: Compressor) -> None:
    """Add the trainable parts of a compressor, and how they were made, to a hash."""
    for module in modules(compressor):
        digest.update(str(getattr(module, "revision", "")).encode())
        digest.update(json.dumps(getattr(module, "settings", None), sort_keys=True, default=str).encode())
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(key.encode() + tensor.detach().float().cpu().numpy().tobytes())
