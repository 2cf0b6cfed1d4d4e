"""What a compressor is, and how one is put together from a selection and a merge."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lococo.entries import Entries


class Compressor(Protocol):
    """The only extension point: entries of one layer in, exactly `num_slots` entries out."""

    @property
    def name(self) -> str:
        """Its name in the table of compressors."""
        ...

    @property
    def observes(self) -> frozenset[str]:
        """What the cache takes down for it.

        Any of "mass" (attention each entry received since it came), "queries" (those of the last `chunk_size` tokens)
        and "remembered" (what its own earlier compressions said of each entry).
        """
        ...

    def min_slots(self) -> int:
        """Return the smallest number of slots it can fill."""
        ...

    def compress(self, entries: Entries, num_slots: int, layer_idx: int) -> Entries:
        """Make `num_slots` entries, in temporal order, of more than `num_slots`.

        Layers come in any order and, where no gradients are wanted, several at a time, each in a thread of its own.
        """
        ...


@dataclass(frozen=True)
class Selection:
    """Which entries stay: the first and the last ones, and of the rest those with the highest score.

    Attributes:
        score: Maps entries to (b h s) scores, or (b 1 s) where all heads keep the same ones.
        observes: What the score reads, see `Compressor`.
        sinks: First entries that always stay.
        recent: Last entries that always stay; None: half of the slots.
    """

    score: Callable[[Entries], Tensor]
    observes: frozenset[str] = frozenset()
    sinks: int = 0
    recent: int | None = 0

    def min_slots(self) -> int:
        """Return the smallest number of slots that leaves one to the score."""
        return self.sinks + (self.recent or 0) + 1

    def scores(self, entries: Entries, num_slots: int) -> Tensor:
        """Return the scores, infinite for entries that always stay, (b h s)."""
        scores = self.score(entries).expand(entries.positions.shape).clone()
        recent = num_slots // 2 if self.recent is None else self.recent
        # Filled, since a number that is assigned is copied to a GPU first, which makes the CPU wait for it.
        scores[..., : self.sinks].fill_(torch.inf)
        scores[..., len(entries) - recent :].fill_(torch.inf)
        return scores


class Merge(Protocol):
    """What becomes of the entries that do not stay."""

    @property
    def observes(self) -> frozenset[str]:
        """What it reads, see `Compressor`."""
        ...

    def __call__(self, entries: Entries, kept: Tensor, scores: Tensor, layer_idx: int) -> Entries:
        """Return slots for the entries at `kept`.

        Args:
            entries: All entries, s of them.
            kept: Which of them were selected, ascending, (b h m).
            scores: Of the selection, (b h s).
            layer_idx: The layer they are from, for merges with weights per layer.
        """
        ...


class Drop:
    """The merge of plain eviction: what is not kept is gone."""

    observes: frozenset[str] = frozenset()

    def __call__(self, entries: Entries, kept: Tensor, scores: Tensor, layer_idx: int) -> Entries:
        """Return the kept entries as they are."""
        return entries.take(kept)


@dataclass(frozen=True)
class SelectMerge:
    """A compressor made of a selection and a merge."""

    name: str
    selection: Selection
    merge: Merge

    @property
    def observes(self) -> frozenset[str]:
        """What the cache has to take down."""
        return self.selection.observes | self.merge.observes

    def min_slots(self) -> int:
        """Return the smallest number of slots it can fill."""
        return self.selection.min_slots()

    def compress(self, entries: Entries, num_slots: int, layer_idx: int) -> Entries:
        """Keep the `num_slots` entries with the highest scores, and merge the others into them."""
        scores = self.selection.scores(entries, num_slots)
        kept = scores.topk(num_slots, sorted=False).indices.sort().values
        return self.merge(entries, kept, scores, layer_idx)
