"""What happens inside the slots: where attention goes with them and without, what survives, and for how long."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lococo.attachment import Attachment, attach, window_of
from lococo.cache import SlotCache
from lococo.compressors.base import Compressor
from lococo.compressors.learned import LearnedHeads
from lococo.entries import Entries, attention_mass
from lococo.errors import ArgumentError
from lococo.progress import Counted, beyond
from lococo.reader import read
from lococo.results import Results, Row, key_of

# Parts of the text that is read, oldest first, among which slots are counted.
PARTS = 20

# Tokens that most layers and heads keep, named in the results.
FAVOURITES = 20

KINDS: dict[str, Callable[[str], bool]] = {
    "line breaks": lambda text: "\n" in text,
    "numbers": lambda text: any(letter.isdigit() for letter in text),
    "punctuation": lambda text: bool(text.strip()) and not any(letter.isalnum() for letter in text),
    "names and beginnings": lambda text: text.strip()[:1].isupper(),
    "words": lambda text: text.startswith(" ") and text.strip().isalpha(),
    "rest": lambda text: True,
}


@dataclass
class Watched:
    """A compressor, looked at while it works.

    Attributes:
        inner: The compressor.
        times: Per compression and layer: tokens read, entries held, and of the slots made the parts of the text that
            they are from, their mean age in tokens and their mean log_mass.
        said: Per layer what learned heads said: sums and numbers, see `_said`.
    """

    inner: Compressor
    times: list[Row] = field(default_factory=list)
    said: dict[int, Counter[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the compressor."""
        return self.inner.name

    @property
    def observes(self) -> frozenset[str]:
        """What the compressor asked for, and the queries."""
        return self.inner.observes | {"queries"}

    def min_slots(self) -> int:
        """Return the smallest number of slots it can fill."""
        return self.inner.min_slots()

    def compress(self, entries: Entries, num_slots: int, layer_idx: int) -> Entries:
        """Compress, and take down what became of the entries."""
        slots = self.inner.compress(entries, num_slots, layer_idx)
        seen = int(entries.token_index.max()) + 1
        parts = torch.bincount((slots.token_index * PARTS // seen).flatten(), minlength=PARTS)
        self.times.append(
            {
                "layer": layer_idx,
                "tokens": seen,
                "entries": len(entries),
                "slots": len(slots),
                "parts": (parts / parts.sum()).tolist(),
                "age": (seen - slots.token_index).float().mean().item(),
                "log_mass": slots.log_mass.mean().item(),
                "of_the_first_chunk": (slots.token_index < num_slots).float().mean().item(),
            }
        )
        if isinstance(self.inner, LearnedHeads):
            self.said.setdefault(layer_idx, Counter()).update(_said(self.inner.corrections(entries, layer_idx)))
        return slots


def _said(corrections: dict[str, Tensor]) -> dict[str, float]:
    """Return sums and sums of squares of what heads said about the entries of one compression."""
    sums: dict[str, float] = {}
    for name, values in corrections.items():
        sums |= {f"{name} sum": values.sum().item(), f"{name} squares": values.square().sum().item()}
        sums[f"{name} entries"] = values.numel()
    return sums


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    *,
    compressors: Sequence[str],
    num_slots: int = 512,
    chunk_size: int = 256,
    results: Results | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Read a text with each compressor, and look inside.

    Attention is compared where the text still fits the model's window: at the last chunk that does.

    Args:
        model: Not attached.
        tokenizer: The model's.
        ids: Of the text, of any length.
        compressors: Names.
        num_slots: Mean over the layers.
        chunk_size: Tokens per forward pass.
        results: Where rows go as they are done.
        progress: Called with tokens read and tokens in all.

    Returns:
        One row per compressor: task, compressor, num_slots, chunk_size, tokens, and
        attention (per layer and key/value head: overlap of the last chunk's attention with the full cache's, the share
        `kept` of the full cache's attention that goes to what is still there, and the divergence `kl` of the two on
        that), attention_tokens (where it is compared), drift (per compression, mean of the layers), layers (per layer:
        slots, mean age and log_mass at the end, and what learned heads said), kinds (share of each kind of token in the
        text and in the slots), favourites (tokens that most layers and heads keep), and nll per so many tokens.

    Raises:
        ArgumentError: If the text is too short to be compressed.
    """
    results = Results() if results is None else results
    rows = []
    names = list(dict.fromkeys(compressors))
    attached = [attach(model, name, num_slots=num_slots, chunk_size=chunk_size) for name in names]
    if any(attachment.compressor is None for attachment in attached):
        raise ArgumentError("there are no slots to look inside with the full cache; name other compressors")
    for number, attachment in enumerate(attached):
        assert attachment.compressor is not None
        settings = {
            "task": "inside",
            "compressor": attachment.compressor.name.rpartition("/")[2],
            "num_slots": num_slots,
            "chunk_size": chunk_size,
            "tokens": len(ids),
        }
        counted = beyond(progress, number * len(ids), len(names) * len(ids))
        measure = partial(_measured, model, tokenizer, list(ids), attachment, counted)
        rows.append(results.measured(settings, measure, of=attachment.fingerprint() + key_of({"ids": list(ids)})))
    return rows


@torch.no_grad()
def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    attachment: Attachment,
    counted: Counted,
) -> Row:
    least, chunk = min(attachment.slots_per_layer), attachment.chunk_size
    fits = min(len(ids), window_of(model) or len(ids))
    # Buffers are full here, so that the last chunk is whole and all that is held is seen by it.
    compared = least + (fits - least) // chunk * chunk
    if compared < least + 2 * chunk:
        limit = "window" if fits < len(ids) else "text"
        raise ArgumentError(
            f"a {limit} of {fits} tokens is hardly compressed with {least} slots, which takes {least + 2 * chunk} or "
            "more; give a longer one, or fewer slots"
        )
    cache = attachment.new_cache()
    assert isinstance(cache, SlotCache)
    assert attachment.compressor is not None
    watched = Watched(attachment.compressor)
    for layer in cache.slot_layers:
        layer.compressor = watched
    nll: list[float] = []
    attention: list[Row] = []
    with attachment:
        last: Tensor | None = None
        for stretch in (ids[:compared], ids[compared:]):
            for piece in read(model, torch.tensor([stretch]), cache, all_logits=True) if stretch else ():
                nll += _losses(piece.logits, piece.ids, last)
                last = piece.logits[:, -1:]
                counted(cache.get_seq_length())
            if not attention:
                attention = _compared(model, ids[:compared], cache, attachment)
    return {
        "attention_tokens": compared,
        "attention": attention,
        "drift": _drift(watched.times),
        "layers": _layers(watched, cache),
        **_survivors(cache, ids, tokenizer),
        "nll": [sum(nll[i : i + 1024]) / len(nll[i : i + 1024]) for i in range(0, len(nll), 1024)],
    }


def _losses(logits: Tensor, ids: Tensor, last: Tensor | None) -> list[float]:
    """Return the nll of each token of a piece but the text's first, in nats."""
    before = logits[:, :-1] if last is None else torch.cat([last.to(logits.device), logits[:, :-1]], 1)
    targets = (ids if last is not None else ids[:, 1:]).to(logits.device)
    losses: list[float] = torch.nn.functional.cross_entropy(
        before.flatten(0, 1).float(), targets.flatten(), reduction="none"
    ).tolist()
    return losses


def _compared(model: PreTrainedModel, ids: list[int], slots: SlotCache, attachment: Attachment) -> list[Row]:
    """Compare the last chunk's attention over slots with that over the whole text, per layer and head."""
    whole = SlotCache(
        DynamicCache(config=model.config).layers,
        slots.slot_layers[0].compressor,
        [len(ids)] * len(slots.slot_layers),
        attachment.chunk_size,
        attachment.positions,
        attachment.rotary,
        window_of(model),
    )
    for _ in read(model, torch.tensor([ids]), whole):
        pass
    rows = []
    for with_slots, full in zip(slots.slot_layers, whole.slot_layers, strict=True):
        here, there = (layer.entries([0], layer.filled[0]) for layer in (with_slots, full))
        p, q = (_over_tokens(entries, len(ids)) for entries in (there, here))
        held = torch.zeros_like(p).scatter_(1, here.token_index[0], 1.0)
        overlap, kept = torch.minimum(p, q).sum(1), (p * held).sum(1)
        restricted = p * held / kept[:, None]
        kl = (restricted * (restricted.clamp(min=1e-12) / q.clamp(min=1e-12)).log()).sum(1)
        for head in range(len(p)):
            rows.append(
                {
                    "layer": with_slots.layer_idx,
                    "head": head,
                    "overlap": overlap[head].item(),
                    "kept": kept[head].item(),
                    "kl": kl[head].item(),
                }
            )
    return rows


def _over_tokens(entries: Entries, tokens: int) -> Tensor:
    """Return the last chunk's mean attention to each token of the text, that to slots given to their anchors, (h n)."""
    assert entries.queries is not None
    seen = torch.arange(len(entries) - entries.queries.shape[3], len(entries)) + 1
    mass = attention_mass(
        entries.keys,
        entries.log_mass,
        entries.queries,
        scaling=entries.scaling,
        softcap=entries.softcap,
        visible=seen[None].to(entries.keys.device),
    )[0]
    return torch.zeros(len(mass), tokens, device=mass.device).scatter_add_(1, entries.token_index[0], mass) / mass.sum(
        1, keepdim=True
    )


def _drift(times: Sequence[Row]) -> list[Row]:
    """Return the mean over the layers of what was taken down at every compression."""
    by_time: dict[int, list[Row]] = {}
    for row in sorted(times, key=lambda row: int(row["layer"])):  # they came in any order
        by_time.setdefault(row["tokens"], []).append(row)
    made = []
    for tokens, rows in sorted(by_time.items()):
        means = {
            name: sum(row[name] for row in rows) / len(rows)
            for name in ("entries", "slots", "age", "log_mass", "of_the_first_chunk")
        }
        parts = [sum(column) / len(rows) for column in zip(*(row["parts"] for row in rows), strict=True)]
        made.append({"tokens": tokens, **means, "parts": parts})
    return made


def _layers(watched: Watched, cache: SlotCache) -> list[Row]:
    """Return per layer its slots, the last age and log_mass, and mean and deviation of what heads said."""
    last = {row["layer"]: row for row in watched.times}
    made = []
    for layer in cache.slot_layers:
        row = last.get(layer.layer_idx, {})
        said: dict[str, float] = {}
        sums = watched.said.get(layer.layer_idx, Counter())
        for name in {key.rpartition(" ")[0] for key in sums}:
            count = sums[f"{name} entries"]
            mean = sums[f"{name} sum"] / count
            said[name] = mean
            said[f"{name} deviation"] = math.sqrt(max(0.0, sums[f"{name} squares"] / count - mean**2))
        figures = {name: row.get(name) for name in ("age", "log_mass")}
        made.append({"layer": layer.layer_idx, "num_slots": layer.num_slots, **figures, **dict(sorted(said.items()))})
    return made


def _survivors(cache: SlotCache, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return which kinds of tokens slots hold, beside their share of the text, and those that most heads hold."""
    heads = Counter(
        index
        for layer in cache.slot_layers
        for head in layer.token_index[0, :, : layer.held[0]].tolist()
        for index in head
    )
    texts = {index: str(tokenizer.decode([ids[index]])) for index in heads}
    kinds = {kind: {"text": 0.0, "slots": 0.0} for kind in KINDS}
    count = Counter(_kind(str(tokenizer.decode([token]))) for token in ids)
    for kind, number in count.items():
        kinds[kind]["text"] = number / len(ids)
    for index, number in heads.items():
        kinds[_kind(texts[index])]["slots"] += number / heads.total()
    places = sum(layer.token_index.shape[1] for layer in cache.slot_layers)
    favourites = [
        {"token": index, "text": texts[index], "share_of_heads": number / places}
        for index, number in sorted(heads.items(), key=lambda item: (-item[1], item[0]))[:FAVOURITES]
    ]
    return {"kinds": kinds, "favourites": favourites}


def _kind(text: str) -> str:
    return next(kind for kind, fits in KINDS.items() if fits(text))
