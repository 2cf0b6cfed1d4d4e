"""Fit the scores: what is worth keeping is learned from what later queries really attend to.

A choice has no gradient, so scores are not trained through the model. The model is read once per window, which gives an
example for every layer at every compression: the entries, and the attention that the full cache's queries give them at
the answers to the window's questions. Then each layer's net is fitted alone, over and over, at next to no cost. What it
raises takes the place of entries with more look-ahead mass, and that is its price: a fit to the true mass of the next
chunks was tried and made predictions worse (docs/log.md).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lococo.attachment import attach
from lococo.cache import SlotCache
from lococo.compressors.learned import FULL_SCORES_SLOTS, LearnedHeads, content_of, facts_of, raised
from lococo.compressors.nets import Net
from lococo.compressors.selections import RECENT
from lococo.entries import Entries
from lococo.reader import prefill
from lococo.train.losses import later_mass, retention_loss, teach
from lococo.train.recall import Recall

BATCH = 8

# A score above all others, of entries that stay in any case.
ALWAYS = 50.0

# Share of the windows whose examples tell when a fit is good, and are not fitted to.
HELD_OUT = 0.15


@dataclass(frozen=True)
class Example:
    """One layer's entries before a compression.

    Attributes:
        content: See `content_of`, (h s 2d).
        facts: See `facts_of`, (h s facts).
        ahead: Look-ahead mass, (h s).
        recalled: Attention per query of the answers at the window's end, (h s).
        num_slots: How many stay.
        window: Number of the window it is from.
    """

    content: Tensor
    facts: Tensor
    ahead: Tensor
    recalled: Tensor
    num_slots: int
    window: int


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    heads: LearnedHeads,
    window: Recall,
    *,
    num_slots: int,
    chunk_size: int,
    number: int,
) -> dict[int, list[Example]]:
    """Read a window in slots, and return the examples of every layer, as long as there is something to be asked.

    What the questions will ask for is kept while it is read, so that it is there to be learned from to the end.

    Args:
        model: Not attached.
        heads: That compress while it is read.
        window: Text and the places of its answers.
        num_slots: Mean over the layers.
        chunk_size: Tokens per forward pass.
        number: The window's.
    """
    ids = torch.tensor([window.ids], device=model.device)
    asked = torch.tensor(window.asked, dtype=torch.long, device=model.device)
    examples: dict[int, list[Example]] = {layer_idx: [] for layer_idx in heads.form.layers}
    with attach(model, heads, num_slots=num_slots, chunk_size=chunk_size) as slots:
        teacher = teach(slots, model, ids, asked)
        cache = slots.new_cache()
        assert isinstance(cache, SlotCache)

        def take(layer_idx: int, entries: Entries, kept: int) -> Tensor | None:
            seen = cache.rows.tokens[0]
            places = asked[asked >= seen]
            if not len(places):
                return None
            recalled = later_mass(teacher, layer_idx, entries, seen=seen, places=places)
            ahead = entries.future_mass.clamp(min=1e-9)
            content, facts = content_of(entries).bfloat16(), facts_of(entries, ahead)
            parts = zip(content.cpu(), facts.cpu(), ahead.cpu(), recalled.cpu(), strict=True)
            examples[layer_idx] += [Example(*part, kept, number) for part in parts]
            return recalled * ahead.sum(-1, keepdim=True)

        heads.on_compress = take
        try:
            prefill(model, ids, cache)
        finally:
            heads.on_compress = None
    return examples


def fit(
    heads: LearnedHeads,
    examples: dict[int, list[Example]],
    *,
    recall_weight: float = 1.0,
    epochs: int = 10,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> dict[int, tuple[float, float]]:
    """Fit every layer's scores; a layer whose held-out examples get worse by it keeps what it had.

    Args:
        heads: Changed in place.
        examples: By layer.
        recall_weight: What attention of the answers counts beside look-ahead mass: how likely it is that somebody asks.
        epochs: Times that each example is seen.
        learning_rate: Of Adam, at the beginning; it falls to 0.
        seed: Of the order.

    Returns:
        By layer, the mass that goes, held out, before and after; see `lost_mass`.
    """
    lost = {}
    for layer_idx, own in examples.items():
        if not own:  # a layer that was never compressed
            continue
        net = heads.scorers[str(layer_idx)]
        assert isinstance(net, Net)
        windows = sorted({example.window for example in own})
        apart = set(windows[: max(1, round(HELD_OUT * len(windows)))]) if len(windows) > 1 else set()
        train = [example for example in own if example.window not in apart]
        test = [example for example in own if example.window in apart] or train
        before, kept = (
            lost_mass(net, test, recall_weight),
            {name: part.clone() for name, part in net.state_dict().items()},
        )
        _fit_layer(net, train, recall_weight, epochs, learning_rate, random.Random(seed))
        after = lost_mass(net, test, recall_weight)
        if not after <= before:
            net.load_state_dict(kept)
            after = before
        lost[layer_idx] = (before, after)
    return lost


def _fit_layer(
    net: Net, examples: list[Example], recall_weight: float, epochs: int, learning_rate: float, draw: random.Random
) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    total = epochs * len(list(_batches(examples, draw)))
    step = 0
    for _ in range(epochs):
        for batch in _batches(examples, draw):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / total)
            loss, _ = _loss(net, batch, recall_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


@torch.no_grad()
def lost_mass(net: Net, examples: list[Example], recall_weight: float = 1.0) -> float:
    """Return the mean mass, of look-ahead and of answers, of the entries that would not stay."""
    lost = [_loss(net, batch, recall_weight)[1].item() * len(batch) for batch in _batches(examples, random.Random(0))]
    return sum(lost) / len(examples)


def _loss(net: Net, batch: list[Example], recall_weight: float) -> tuple[Tensor, Tensor]:
    parameter = net.head
    content, facts, ahead, recalled = (
        torch.stack([getattr(example, name) for example in batch]).to(parameter)
        for name in ("content", "facts", "ahead", "recalled")
    )
    wanted = ahead / ahead.sum(-1, keepdim=True) + recall_weight * recalled
    # In full, whatever the number of slots: how much a scorer counts there is decided when it is used.
    scores = raised(ahead, net(content, facts)[0], FULL_SCORES_SLOTS).log()
    scores = torch.cat([scores[..., :-RECENT], torch.full_like(scores[..., -RECENT:], ALWAYS)], -1)
    return retention_loss(scores, wanted, batch[0].num_slots)


def _batches(examples: list[Example], draw: random.Random) -> Iterator[list[Example]]:
    """Yield examples of one size at a time, in random order."""
    sizes: dict[tuple[int, int], list[Example]] = {}
    for example in examples:
        sizes.setdefault((example.ahead.shape[-1], example.num_slots), []).append(example)
    batches = []
    for group in sizes.values():
        draw.shuffle(group)
        batches += [group[start : start + BATCH] for start in range(0, len(group), BATCH)]
    draw.shuffle(batches)
    yield from batches
