"""What a step learns from: a window of text, and what its reading in slots is held against."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lococo.attachment import attach
from lococo.cache import SlotCache
from lococo.compressors import Compressor
from lococo.train.data import Corpus
from lococo.train.losses import divergences, next_token_losses, teach
from lococo.train.matching import attention_errors
from lococo.train.recipe import Recipe


@dataclass(frozen=True)
class Lesson:
    """One window that is being read.

    Attributes:
        losses: After each chunk, the summed loss of its predictions that count, and how many those are.
        tokens: Of the window.
        counted: Predictions that count, of the whole window.
        cut: Keeps gradients from reaching what was read so far.
        compressions: After how many chunks gradients are sent back and cut off; 0: at the window's end alone.
        weight: What the window counts beside others.
    """

    losses: Iterator[tuple[Tensor, int]]
    tokens: int
    counted: int
    cut: Callable[[], None]
    compressions: int
    weight: float = 1.0


class Lessons(Protocol):
    """Windows by seed and number."""

    @property
    def model(self) -> PreTrainedModel:
        """The model that reads."""
        ...

    @property
    def turns(self) -> tuple[int, ...]:
        """Numbers of slots, which take turns from step to step."""
        ...

    def lesson(self, seed: int, number: int, num_slots: int) -> AbstractContextManager[Lesson]:
        """Open a window; gradients flow unless the caller switches them off."""
        ...


@dataclass(frozen=True)
class HeadLessons:
    """What heads of a frozen model learn from.

    Attributes:
        model: Not attached.
        compressor: The heads.
        corpus: Windows are drawn from it.
        recipe: How.
    """

    model: PreTrainedModel
    compressor: Compressor
    corpus: Corpus
    recipe: Recipe

    @property
    def turns(self) -> tuple[int, ...]:
        """Numbers of slots, which take turns."""
        return self.recipe.num_slots

    def ids(self, seed: int, number: int, num_slots: int) -> Tensor:
        """Return a window, (1 n), that is compressed at least once."""
        least = num_slots + 2 * self.recipe.chunk_size
        ids = self.corpus.window(seed, number, length=self.recipe.length, least=least)
        return torch.tensor([ids], device=self.model.device)

    @contextmanager
    def lesson(self, seed: int, number: int, num_slots: int) -> Iterator[Lesson]:
        """Open a window; see `Lessons`."""
        recipe, ids = self.recipe, self.ids(seed, number, num_slots)
        with attach(self.model, self.compressor, num_slots=num_slots, chunk_size=recipe.chunk_size) as slots:
            # From the first compression of any layer on.
            first = min(slots.slots_per_layer) + recipe.chunk_size
            compared = torch.arange(first, ids.shape[1] - 1, recipe.compare_every, device=ids.device)
            cache = slots.new_cache()
            assert isinstance(cache, SlotCache)
            if recipe.objective == "next-token":
                losses = next_token_losses(self.model, ids, cache, compared, chunk_size=recipe.chunk_size)
            else:
                teacher = teach(slots, self.model, ids, compared)
                differ = divergences if recipe.objective == "distillation" else attention_errors
                losses = differ(self.model, ids, cache, teacher)
            # With more slots less is lost, and it has to be seen beside what fewer slots lose.
            weight = math.sqrt(num_slots / min(recipe.num_slots))
            yield Lesson(losses, ids.numel(), len(compared), cache.detach, recipe.compressions, weight)
