"""What a SlotCache keeps so that it can forget its last tokens, while an assistant guesses them.

Prompt lookup and assisted decoding let the model read several guessed tokens at once and take back those that it would
not have written. Entries that are taken back need only not be counted: the next ones are written over them, and so are
the queries in the ring, which are all newer than the last compression when the next one comes. A compression in their
midst cannot be undone, nor can a sliding layer find again what it let go. So a copy of the cache is made before every
chunk, and thrown away as soon as `crop` has told what stays.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from lococo.errors import LococoError
from lococo.rows import Chunk, Rows
from lococo.slot_layer import SlotLayer
from lococo.state_layer import has_state, is_state

if TYPE_CHECKING:
    from lococo.cache import SlotCache

# Tokens that can be forgotten at least; copies from before them go, so that a long prompt does not fill the memory.
RECALLED = 256


@dataclass(frozen=True)
class Step:
    """A chunk that may still be taken back.

    Attributes:
        before: Copy of the cache as it was before the chunk and the compression in front of it.
        chunk: What was read.
        rows: How far the rows had come between the compression and the chunk.
    """

    before: "SlotCache"
    chunk: Chunk
    rows: Rows


class Past:
    """The chunks since the last `crop`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        """Take down a chunk that was read, and let go of those that are too old."""
        self.steps.append(step)
        later = sum(each.chunk.length for each in self.steps[1:])
        while later >= RECALLED:
            self.steps.pop(0)
            later -= self.steps[0].chunk.length

    def forget(self, cache: "SlotCache", columns: int) -> None:
        """Bring a cache back to where it was before its last columns, and begin anew from there.

        Raises:
            LococoError: If they are more than was taken down.
        """
        recorded = sum(step.chunk.length for step in self.steps)
        if columns > recorded:
            raise LococoError(
                f"a SlotCache can forget the tokens read since the last crop(), and {RECALLED} at most: "
                f"{columns} were to go, {recorded} are at hand; let the assistant guess fewer tokens at a time"
            )
        while columns and columns >= self.steps[-1].chunk.length:
            step = self.steps.pop()
            columns -= step.chunk.length
            cache.rows, cache.layers = step.before.rows, step.before.layers
        if columns:
            _keep_beginning(cache, self.steps[-1], columns)
        self.steps.clear()


def _keep_beginning(cache: "SlotCache", step: Step, columns: int) -> None:
    """Take the last columns of the latest chunk back: its beginning is observed and counted again, by itself."""
    if any(has_state(layer) and not is_windowed(layer) for layer in cache.layers):
        raise LococoError(
            "a recurrent state cannot forget a part of what it has read; decode without prompt lookup and assistants"
        )
    beginning = step.chunk.first(step.chunk.length - columns)
    vars(cache.rows).update(vars(copy.deepcopy(step.rows)))
    for layer in cache.layers:
        if isinstance(layer, SlotLayer):
            layer.read_again(beginning)
        elif is_windowed(layer):
            layer.crop(-columns)
    cache.rows.advance(beginning)


def is_windowed(layer: object) -> TypeGuard[DynamicLayer | LinearAttentionLayer]:
    """Tell whether a layer of transformers' own holds the latest tokens, of which it can forget the last.

    Sliding layers do, and so do convolutions (LFM 2), unless a recurrent state stands beside them.
    """
    if isinstance(layer, LinearAttentionLayer):
        return is_state(layer) and layer.is_croppable
    return isinstance(layer, DynamicLayer) and layer.is_initialized
