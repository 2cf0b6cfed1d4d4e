"""The loop: read a chunk, attend over slots and chunk, compress when the buffer is full.

`read` is that loop; `prefill`, `stream` and `score` consume it. The cache decides what happens to what was read, so
the same loop runs the full cache (a DynamicCache) and every compressor.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    Cache,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lococo.cache import SlotCache
from lococo.cache_name import cache_name
from lococo.errors import ArgumentError

CHUNK_SIZE = 256

# Below it the likeliest token has all the probability that float32 can tell.
LEAST_TEMPERATURE = 1e-6


@dataclass
class Piece:
    """One chunk that was read.

    Attributes:
        ids: (b q).
        logits: Of its last token (b 1 v), or of all (b q v).
    """

    ids: Tensor
    logits: Tensor


def read(
    model: PreTrainedModel,
    ids: Tensor | Iterable[list[int]],
    cache: Cache,
    *,
    attention_mask: Tensor | None = None,
    all_logits: bool = False,
) -> Iterator[Piece]:
    """Read tokens chunk by chunk into a cache.

    Args:
        model: Attached, unless the cache is a DynamicCache.
        ids: (b n); or a stream of lists of ids, for a text that need not fit in memory.
        cache: Continues from what it holds.
        attention_mask: 0 for padding, (b tokens seen + n); only with a tensor of ids.
        all_logits: Yield the logits of every token instead of the chunk's last.

    Yields:
        What was read, in order. Gradients flow unless the caller switches them off.

    Raises:
        ArgumentError: If there is nothing to read.
    """
    feed = _Tensor(ids) if isinstance(ids, Tensor) else _Stream(ids)
    name = cache_name(model)
    seen = cache.get_seq_length()
    empty = True
    while (chunk := feed.take(cache.room() if isinstance(cache, SlotCache) else CHUNK_SIZE)) is not None:
        empty = False
        seen += chunk.shape[1]
        output = model(
            input_ids=chunk.to(model.device),
            attention_mask=None if attention_mask is None else attention_mask[:, :seen].to(model.device),
            **{name: cache},
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        yield Piece(chunk, output.logits)
    if empty:
        raise ArgumentError("expected at least one token to read, got none; give a text that is not empty")


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    ids: Tensor | Iterable[list[int]],
    cache: Cache,
    *,
    attention_mask: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Read a text into a cache.

    Args:
        model: See `read`.
        ids: See `read`.
        cache: See `read`.
        attention_mask: See `read`.
        progress: Called after every chunk with its number of tokens.

    Returns:
        The logits after the last token, (b v).
    """
    logits = torch.empty(0)
    for piece in read(model, ids, cache, attention_mask=attention_mask):
        logits = piece.logits[:, -1]
        if progress is not None:
            progress(piece.ids.shape[1])
    return logits


@torch.no_grad()
def score(model: PreTrainedModel, ids: Tensor, cache: Cache, *, previous: Tensor | None = None) -> Tensor:
    """Return the log-likelihood of every token of a text, given what the cache holds.

    Args:
        model: See `read`.
        ids: (b n).
        cache: See `read`.
        previous: Logits after the last token that the cache has seen (b v), from `prefill`; scores the first token too.

    Returns:
        Natural logarithms, float32: (b n) with `previous`, else (b n - 1). Tokens at chunk boundaries are scored too.
    """
    scores = []
    start = 0
    for piece in read(model, ids, cache, all_logits=True):
        logits = piece.logits if previous is None else torch.cat([previous[:, None], piece.logits], 1)
        first = start if previous is not None else 1
        start += piece.ids.shape[1]
        targets = ids[:, first:start].to(logits.device)
        log_probabilities = logits[:, : targets.shape[1]].float().log_softmax(-1)
        scores.append(log_probabilities.gather(2, targets[..., None])[..., 0])
        previous = piece.logits[:, -1]
    return torch.cat(scores, 1)


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    ids: Tensor,
    cache: Cache,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[int]:
    """Read a prompt and yield the tokens that the model answers with, as they come.

    The cache ends up holding prompt and answer, except for the token that ends the answer, so that a conversation can
    go on from it.

    Args:
        model: See `read`.
        ids: The prompt, (1 n).
        cache: See `read`.
        max_new_tokens: Where to stop at the latest.
        temperature: 0 takes the likeliest token.
        top_k: Sample from this many likeliest tokens; 0 from all.
        top_p: Sample from the likeliest tokens of this total probability.
        seed: Of the sampling.

    Yields:
        Token ids, without the one that ends the answer.

    Raises:
        ArgumentError: If an argument is out of range or the prompt is a batch.
    """
    if ids.shape[0] != 1:
        raise ArgumentError(
            f"stream() answers one prompt at a time, got a batch of {ids.shape[0]}; use model.generate()"
        )
    sampler = Sampler(model.device, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    ends = end_tokens(model)
    logits = prefill(model, ids, cache)
    for _ in range(max_new_tokens):
        token = sampler.pick(logits)
        if token in ends:
            return
        yield token
        logits = prefill(model, torch.tensor([[token]]), cache)


class Sampler:
    """Chooses the next token of one answer, with random numbers of its own.

    Args:
        device: Where the logits are.
        temperature: 0 takes the likeliest token.
        top_k: Sample from this many likeliest tokens; 0 from all.
        top_p: Sample from the likeliest tokens of this total probability.
        seed: Repeats the same choices.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        self.greedy = temperature < LEAST_TEMPERATURE
        self.warpers = _warpers(temperature, top_k, top_p)
        if seed is not None and not 0 <= seed < 1 << 63:
            raise ArgumentError(f"expected a seed from 0 to 2**63 - 1, got {seed}")
        self.generator = torch.Generator(device)
        self.generator.manual_seed(seed) if seed is not None else self.generator.seed()

    def pick(self, logits: Tensor) -> int:
        """Return the token that follows, given its logits (1 v)."""
        if self.greedy:
            return int(logits.argmax())
        no_ids = torch.empty(1, 0, dtype=torch.long)  # these warpers look at the logits alone
        probabilities = self.warpers(no_ids, logits.float()).softmax(-1)  # type: ignore[arg-type]
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    if not 0 <= temperature < float("inf") or top_k < 0 or not 0 < top_p <= 1:
        raise ArgumentError(
            f"expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {temperature}, {top_k} and {top_p}"
        )
    warpers = LogitsProcessorList()
    if temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}


class _Tensor:
    """Feeds a tensor of ids, (b n)."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def take(self, length: int) -> Tensor | None:
        chunk, self.ids = self.ids[:, :length], self.ids[:, length:]
        return chunk if chunk.shape[1] else None


class _Stream:
    """Feeds lists of ids as they come, holding back no more than is asked for at a time."""

    def __init__(self, lists: Iterable[list[int]]) -> None:
        self.lists = iter(lists)
        self.waiting: list[int] = []

    def take(self, length: int) -> Tensor | None:
        while len(self.waiting) < length and (more := next(self.lists, None)) is not None:
            self.waiting += more
        chunk, self.waiting = self.waiting[:length], self.waiting[length:]
        return torch.tensor([chunk]) if chunk else None
