"""What a model and its heads learn far beyond the window from: the text itself, every token of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
        """Open a window; see `Lessons`. Every token but the first of each document counts."""
        recipe = self.recipe
        pieces = packed_window(self.corpus, seed, number, length=recipe.length, begin=recipe.begin)
        with attach(self.model, self.compressor, num_slots=num_slots, chunk_size=recipe.chunk_size) as slots:
            reading = _Reading(self.model, slots, recipe.chunk_size)
            # The full cache has no gradient that could be cut off: whatever is read attends to all before it.
            compressions = 0 if slots.compressor is None else recipe.compressions
            tokens = sum(map(len, pieces))
            yield Lesson(reading.losses(pieces), tokens, tokens - len(pieces), reading.cut, compressions)


class _Reading:
    """One window while it is read: a cache for each document."""

    def __init__(self, model: PreTrainedModel, slots: Attachment, chunk_size: int) -> None:
        self.model, self.slots, self.chunk_size = model, slots, chunk_size
        self.cache: Cache | None = None

    def losses(self, pieces: list[list[int]]) -> Iterator[tuple[Tensor, int]]:
        for piece in pieces:
            ids = torch.tensor([piece], device=self.model.device)
            self.cache = self.slots.new_cache()
            foretelling = torch.arange(len(piece) - 1, device=ids.device)
            yield from next_token_losses(self.model, ids, self.cache, foretelling, chunk_size=self.chunk_size)

    def cut(self) -> None:
        if isinstance(self.cache, SlotCache):
            self.cache.detach()
