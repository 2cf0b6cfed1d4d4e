"""What several texts begin with, read once: batches of texts with a cache that holds their beginning already."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import Cache, PreTrainedModel

from lococo.cache import fork
from lococo.errors import ArgumentError
from lococo.reader import prefill

# What texts begin with is read on its own if it is at least this many tokens.
LEAST_SHARED = 32


@dataclass(frozen=True)
class Wanted:
    """A text, and how much of it may be read together with others.

    Attributes:
        ids: Its tokens.
        shareable: Leading tokens whose predictions nobody asks for, at least one less than there are.
    """

    ids: list[int]
    shareable: int

    def __post_init__(self) -> None:
        if not 0 <= self.shareable < len(self.ids):
            raise ArgumentError(f"of {len(self.ids)} tokens {self.shareable} cannot be shared; give a longer text")


def groups(
    model: PreTrainedModel, new_cache: Callable[[], Cache], wanted: Sequence[Wanted], batch_size: int = 1
) -> Iterator[tuple[Cache, int, list[int]]]:
    """Read what texts begin with, each beginning once, and yield batches of them with a cache to go on from.

    Args:
        model: Attached, unless caches are of transformers.
        new_cache: Makes an empty cache.
        wanted: The texts.
        batch_size: Most texts of a batch.

    Yields:
        A cache with as many rows as the batch has texts, the number of tokens that it has read of each, and the
        numbers of the texts.
    """
    if not wanted:
        return
    order = sorted(range(len(wanted)), key=lambda number: wanted[number].ids)
    yield from _groups(model, new_cache(), 0, wanted, order, batch_size)


def _groups(
    model: PreTrainedModel, cache: Cache, start: int, wanted: Sequence[Wanted], order: list[int], batch_size: int
) -> Iterator[tuple[Cache, int, list[int]]]:
    """Go on from a cache that holds the first `start` tokens of all texts in `order`, which is sorted by tokens.

    The cache stays as it is: what is read goes into copies of it.
    """
    # A text of which little may be shared must not keep the others from sharing more.
    apart = [number for number in order if wanted[number].shareable < start + LEAST_SHARED]
    order = [number for number in order if wanted[number].shareable >= start + LEAST_SHARED]
    shared, stop, rest = cache, start, []
    if order and (same := _common(wanted, order)) >= start + LEAST_SHARED:
        shared, stop = fork(cache), same
        prefill(model, torch.tensor([wanted[order[0]].ids[start:stop]]), shared)
    for group in _parted(wanted, order, same) if order else ():
        if any(_common(wanted, [*pair]) >= stop + LEAST_SHARED for pair in pairwise(group)):
            yield from _groups(model, shared, stop, wanted, group, batch_size)
        else:
            rest += group
    yield from _batches(model, cache, start, wanted, apart, batch_size)
    yield from _batches(model, shared, stop, wanted, rest, batch_size)


def _batches(
    model: PreTrainedModel, cache: Cache, stop: int, wanted: Sequence[Wanted], apart: list[int], batch_size: int
) -> Iterator[tuple[Cache, int, list[int]]]:
    """Yield texts that go on alone from a cache that holds the first `stop` tokens of each."""
    # Texts of one length waste no padding.
    apart.sort(key=lambda number: len(wanted[number].ids))
    for first in range(0, len(apart), batch_size):
        batch, own, seen = apart[first : first + batch_size], fork(cache), stop
        if len(batch) == 1 and (rest := wanted[batch[0]].ids[stop : wanted[batch[0]].shareable]):
            prefill(model, torch.tensor([rest]), own)
            seen += len(rest)
        elif len(batch) > 1 and stop:
            own.batch_repeat_interleave(len(batch))
        yield own, seen, batch


def _common(wanted: Sequence[Wanted], order: list[int]) -> int:
    """Return how many tokens texts that are sorted have in common and may share."""
    first, last = wanted[order[0]].ids, wanted[order[-1]].ids
    most = min(wanted[number].shareable for number in order)
    return next((place for place in range(most) if first[place] != last[place]), most)


def _parted(wanted: Sequence[Wanted], order: list[int], place: int) -> Iterator[list[int]]:
    """Split texts that are sorted by their token at a place."""
    group: list[int] = []
    for number in order:
        if group and wanted[number].ids[place : place + 1] != wanted[group[0]].ids[place : place + 1]:
            yield group
            group = []
        group.append(number)
    if group:
        yield group
