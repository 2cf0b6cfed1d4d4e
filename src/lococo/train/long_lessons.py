"""What a model and its heads learn far beyond the window from: the text itself, every token of it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lococo.attachment import Attachment, attach
from lococo.cache import SlotCache
from lococo.compressors import Compressor
from lococo.train.data import Corpus
from lococo.train.extension import Extension
from lococo.train.lessons import Lesson
from lococo.train.losses import next_token_losses
from lococo.train.packing import packed_window


@dataclass(frozen=True)
class LongLessons:
    """Long windows, read in slots with a gradient that is cut off, or with the full cache and the exact gradient.

    Attributes:
        model: Not attached.
        compressor: Makes slots, or "full".
        corpus: Windows are drawn from it.
        recipe: How.
    """

    model: PreTrainedModel
    compressor: Compressor | str
    corpus: Corpus
    recipe: Extension

    @property
    def turns(self) -> tuple[int, ...]:
        """The one number of slots."""
        return (self.recipe.num_slots,)

    @contextmanager
    def lesson(self, seed: int, number: int, num_slots: int) -> Iterator[Lesson]:
        """Open a batch of windows; see `Lessons`. Every token but the first of each document counts."""
        recipe = self.recipe
        numbers = range(number * recipe.batch, (number + 1) * recipe.batch)
        how: dict[str, Any] = {"length": recipe.length, "begin": recipe.begin, "short": recipe.short_documents}
        # Processes that wait for each other must read as many chunks: no window of several documents.
        windows = [packed_window(self.corpus, seed, n, alone=recipe.shard, **how) for n in numbers]
        pieces = side_by_side(windows)
        with attach(self.model, self.compressor, num_slots=num_slots, chunk_size=recipe.chunk_size) as slots:
            reading = _Reading(self.model, slots, recipe.chunk_size)
            # The full cache has no gradient that could be cut off: whatever is read attends to all before it.
            compressions = 0 if slots.compressor is None else recipe.compressions
            tokens = sum(len(piece) for window in windows for piece in window)
            counted = tokens - sum(map(len, windows))
            yield Lesson(reading.losses(pieces), tokens, counted, reading.cut, compressions)


def side_by_side(windows: Iterable[list[list[int]]]) -> list[list[list[int]]]:
    """Put windows whose documents end at the same places into rows beside each other.

    Args:
        windows: Token ids of each piece, see `packed_window`.

    Returns:
        The pieces one after the other, each with the token ids of its rows.
    """
    alike: dict[tuple[int, ...], list[list[list[int]]]] = {}
    for window in windows:
        alike.setdefault(tuple(map(len, window)), []).append(window)
    return [list(rows) for same in alike.values() for rows in zip(*same, strict=True)]


class _Reading:
    """Windows while they are read: a cache for each document, or for several side by side."""

    def __init__(self, model: PreTrainedModel, slots: Attachment, chunk_size: int) -> None:
        self.model, self.slots, self.chunk_size = model, slots, chunk_size
        self.cache: Cache | None = None

    def losses(self, pieces: list[list[list[int]]]) -> Iterator[tuple[Tensor, int]]:
        for rows in pieces:
            ids = torch.tensor(rows, device=self.model.device)
            self.cache = self.slots.new_cache()
            foretelling = torch.arange(ids.shape[1] - 1, device=ids.device)
            yield from next_token_losses(self.model, ids, self.cache, foretelling, chunk_size=self.chunk_size)

    def cut(self) -> None:
        if isinstance(self.cache, SlotCache):
            self.cache.detach()
