"""What heads learn from: the full cache's predictions, and what later queries of the text attend to."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from lococo.attachment import Attachment
from lococo.cache import SlotCache
from lococo.cache_name import cache_name
from lococo.entries import Entries, attention_mass
from lococo.slot_layer import SlotLayer


class Recorder:
    """A compressor that never compresses, for a cache that keeps all queries of a window."""

    name = "recorder"
    observes = frozenset({"queries"})

    def min_slots(self) -> int:
        """Return 1."""
        return 1

    def compress(self, entries: Entries, num_slots: int, layer_idx: int) -> Entries:
        """Refuse: the window was longer than the cache."""
        raise AssertionError("a recorder's cache holds the whole window")


@dataclass
class Teacher:
    """What the frozen model with the full cache says to a window.

    Attributes:
        log_probabilities: Of the tokens that are compared, (b k v).
        cache: Keys, values and queries of every token.
        compared: Which tokens' predictions are compared, ascending, (k).
    """

    log_probabilities: Tensor
    cache: SlotCache
    compared: Tensor

    def layer(self, layer_idx: int) -> SlotLayer:
        """Return one layer of the cache."""
        layer = self.cache.layers[layer_idx]
        assert isinstance(layer, SlotLayer)
        return layer


@torch.no_grad()
def teach(attachment: Attachment, model: PreTrainedModel, ids: Tensor, compared: Tensor) -> Teacher:
    """Read a window with the full cache.

    Args:
        attachment: Entered.
        model: Its model.
        ids: (b n), without padding.
        compared: Tokens whose predictions are kept, ascending, (k).
    """
    layers = DynamicCache(config=model.config).layers
    ones = [1] * len(attachment.layers)
    cache = SlotCache(layers, Recorder(), ones, ids.shape[1], "original", attachment.rotary, None)
    output = model(input_ids=ids, **{cache_name(model): cache}, use_cache=True, logits_to_keep=compared)
    return Teacher(output.logits.float().log_softmax(-1), cache, compared)


@torch.no_grad()
def later_mass(teacher: Teacher, layer_idx: int, entries: Entries, *, seen: int, places: Tensor) -> Tensor:
    """Return the attention that later queries, in the full cache's own words, will give to entries.

    Args:
        teacher: Of the window.
        layer_idx: The layer.
        entries: Of a batch of one row; what they leave out of the text read so far is not attended to.
        seen: Tokens of the window read so far.
        places: Of the queries in the window, none before `seen`, (q).

    Returns:
        Mass per query, (b h s).
    """
    layer = teacher.layer(layer_idx)
    assert layer.queries is not None
    queries = layer.queries[:, :, :, places]
    stop = int(places.max()) + 1
    keys = torch.cat([entries.keys, layer.keys[:, :, seen:stop]], 2)
    log_mass = torch.cat([entries.log_mass, entries.log_mass.new_zeros(*keys.shape[:2], stop - seen)], 2)
    mass = attention_mass(
        keys,
        log_mass,
        queries,
        scaling=entries.scaling,
        softcap=entries.softcap,
        visible=(len(entries) + places - seen + 1)[None],
    )
    return mass[:, :, : len(entries)] / (len(places) * queries.shape[2])


def retention_loss(scores: Tensor, mass: Tensor, num_slots: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the loss of scores and, for the reader, the mass that really goes.

    Each entry stays with a probability that rises with its score, around the score of the last one that stays. The
    loss is the attention that later queries give to those that go.

    Args:
        scores: (b h s), with gradient.
        mass: What each entry is worth, (b h s).
        num_slots: How many stay.
        temperature: Over how many nats of score the line between staying and going is smeared.
    """
    threshold, _ = scores.detach().kthvalue(scores.shape[-1] - num_slots + 1, dim=-1, keepdim=True)
    stays = ((scores - threshold) / temperature).sigmoid()
    slope = (stays * (1 - stays)).detach()
    # A score that rises pushes the threshold up: only a gain over the average at the line is a gain.
    average = (slope * mass).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp(min=1e-9)
    loss = -(stays * (mass - average)).sum(-1).mean()
    return loss, (mass * (scores < threshold)).sum(-1).mean().detach()


def divergences(
    model: PreTrainedModel, ids: Tensor, cache: SlotCache, teacher: Teacher
) -> Iterator[tuple[Tensor, int]]:
    """Read a window in slots, and yield after each chunk how far its predictions are from the full cache's.

    Args:
        model: Attached.
        ids: (b n).
        cache: Empty.
        teacher: Of the same window.

    Yields:
        The divergence KL(full | slots) summed over the chunk's compared tokens and the batch, in nats, and how many.
    """
    for inside, log_probabilities in _read(model, ids, cache, teacher.compared, cache.chunk_size):
        theirs = teacher.log_probabilities[:, inside]
        yield (theirs.exp() * (theirs - log_probabilities)).sum(), theirs.shape[0] * len(inside)


def next_token_losses(
    model: PreTrainedModel, ids: Tensor, cache: Cache, compared: Tensor, *, chunk_size: int
) -> Iterator[tuple[Tensor, int]]:
    """Read a window, and yield after each chunk how ill it foresaw the text, as `divergences` does.

    The tokens after `compared` are foreseen, those at chunk boundaries included. A cache that keeps everything is read
    into as well, in chunks of `chunk_size`.
    """
    for inside, log_probabilities in _read(model, ids, cache, compared, chunk_size):
        targets = ids[:, compared[inside] + 1]
        yield -log_probabilities.gather(2, targets[..., None]).sum(), targets.numel()


def _read(
    model: PreTrainedModel, ids: Tensor, cache: Cache, compared: Tensor, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read a window; yield per chunk which of the compared tokens it holds, and their predictions (b k v)."""
    start = 0
    while start < ids.shape[1]:
        stop = min(start + (cache.room() if isinstance(cache, SlotCache) else chunk_size), ids.shape[1])
        inside = ((compared >= start) & (compared < stop)).nonzero()[:, 0]
        # Before the first compression there is nothing to learn from.
        with torch.set_grad_enabled(len(inside) > 0 and torch.is_grad_enabled()):
            output = model(
                input_ids=ids[:, start:stop],
                **{cache_name(model): cache},
                use_cache=True,
                logits_to_keep=compared[inside] - start,
            )
        if len(inside):
            yield inside, output.logits.float().log_softmax(-1)
        start = stop
