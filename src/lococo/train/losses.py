"""What heads are trained to do: give the full cache's predictions, and keep what will be attended to."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lococo.attachment import Attachment
from lococo.cache import SlotCache
from lococo.entries import Entries, attention_mass
from lococo.slot_layer import SlotLayer

# How far beyond the next compression a score should see, in chunks, and what each further chunk counts.
HORIZON = 2
DISCOUNT = 0.5


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
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=compared)
    return Teacher(output.logits.float().log_softmax(-1), cache, compared)


class Retention:
    """The loss of scores: how much of the future attention goes to entries that would not stay.

    Each entry stays with a probability that rises with its score, around the score of the last one that stays. The
    loss is the attention that later queries of the text give to those that go, in the full cache's own words.
    """

    def __init__(self, teacher: Teacher, cache: SlotCache) -> None:
        self.teacher = teacher
        self.cache = cache
        self.losses: list[Tensor] = []
        self.lost: list[Tensor] = []

    def __call__(self, layer_idx: int, entries: Entries, scores: Tensor, num_slots: int) -> None:
        """Take down the loss of one compression of one layer."""
        mass = self.future_mass(layer_idx, entries)
        if mass is None:
            return
        gap, self_lost = retention_loss(scores, mass, num_slots)
        self.losses.append(gap)
        self.lost.append(self_lost)

    @torch.no_grad()
    def future_mass(self, layer_idx: int, entries: Entries) -> Tensor | None:
        """Return the attention that each entry will get per query, discounted, (b h s); None at the window's end."""
        layer = self.teacher.layer(layer_idx)
        assert layer.queries is not None
        now, chunk = self.cache.rows.tokens[0], self.cache.chunk_size
        stop = min(now + HORIZON * chunk, layer.queries.shape[3])
        if stop - now < chunk // 2:
            return None
        queries = layer.queries[:, :, :, now:stop]
        keys = torch.cat([entries.keys, layer.keys[:, :, now:stop]], 2)
        log_mass = torch.cat([entries.log_mass, entries.log_mass.new_zeros(*keys.shape[:2], stop - now)], 2)
        ahead = torch.arange(stop - now, device=keys.device)
        weight = DISCOUNT ** (ahead // chunk).float()
        mass = attention_mass(
            keys,
            log_mass,
            queries,
            scaling=entries.scaling,
            softcap=entries.softcap,
            visible=(len(entries) + ahead + 1)[None],
            weight=weight[None],
        )
        return mass[:, :, : len(entries)] / (weight.sum() * queries.shape[2])


def retention_loss(scores: Tensor, mass: Tensor, num_slots: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the loss of scores and, for the reader, the mass that really goes.

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
    for inside, log_probabilities in _compared(model, ids, cache, teacher):
        theirs = teacher.log_probabilities[:, inside]
        yield (theirs.exp() * (theirs - log_probabilities)).sum(), theirs.shape[0] * len(inside)


def next_token_losses(
    model: PreTrainedModel, ids: Tensor, cache: SlotCache, teacher: Teacher
) -> Iterator[tuple[Tensor, int]]:
    """Read a window in slots, and yield after each chunk how ill it foresaw the text, as `divergences` does.

    Tokens at chunk boundaries are foreseen, too.
    """
    for inside, log_probabilities in _compared(model, ids, cache, teacher):
        targets = ids[:, teacher.compared[inside] + 1]
        yield -log_probabilities.gather(2, targets[..., None]).sum(), targets.numel()


def _compared(
    model: PreTrainedModel, ids: Tensor, cache: SlotCache, teacher: Teacher
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read a window in slots; yield per chunk which compared tokens it holds, and their log-probabilities (b k v)."""
    start = 0
    while start < ids.shape[1]:
        stop = min(start + cache.room(), ids.shape[1])
        inside = ((teacher.compared >= start) & (teacher.compared < stop)).nonzero()[:, 0]
        # Before the first compression there is nothing to learn from.
        with torch.set_grad_enabled(len(inside) > 0 and torch.is_grad_enabled()):
            output = model(
                input_ids=ids[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=teacher.compared[inside] - start,
            )
        if len(inside):
            yield inside, output.logits.float().log_softmax(-1)
        start = stop
