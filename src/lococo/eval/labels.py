"""How rows of results call compressors."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lococo.errors import ArgumentError

# Stands for the number of slots in the name of a folder of heads.
SLOTS = "{num_slots}"


def label(compressor: str) -> str:
    """Return the name of a compressor, of heads in a folder the folder's name alone."""
    if SLOTS in compressor:
        compressor = compressor.replace(SLOTS, "").rstrip("-_/")
    return Path(compressor).name


def check_labels(compressors: Iterable[str]) -> None:
    """Refuse folders that rows would not tell apart.

    Raises:
        ArgumentError: Lists the labels.
    """
    labels = [label(name) for name in dict.fromkeys(compressors)]
    if len(set(labels)) < len(labels):
        raise ArgumentError(f"rows tell compressors apart by {', '.join(labels)}; rename folders so that they differ")


def with_rows(row: dict[str, Any]) -> str:
    """Name the compressor of a row of `lococo bench`, and how many rows it read side by side where it is several."""
    batch = row.get("batch", 1)
    return str(row["compressor"]) + (f" x {batch}" if batch > 1 else "")
