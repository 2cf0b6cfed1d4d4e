"""Perplexity: what each compressor loses against the full cache, on the same tokens."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.attachment import Attachment, attach, window_of
from lococo.budgets import slots_for
from lococo.cache import Positions
from lococo.corpora import domains, windows_of
from lococo.errors import ArgumentError, DocumentError
from lococo.eval.labels import check_labels, label
from lococo.progress import Counted, beyond
from lococo.reader import score
from lococo.results import Results, Row, key_of

Windows = list[list[int]]

RESAMPLES = 2000


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Path | Mapping[str, Sequence[Path]],
    compressors: Sequence[str],
    num_slots: Sequence[int] = (512,),
    chunk_size: int = 256,
    max_length: int = 4096,
    max_windows: int | None = None,
    positions: Positions = "packed",
    budget: str = "own",
    results: Results | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Score every domain's windows with the full cache and with each compressor.

    Every token from the third chunk of a window on counts, those at chunk boundaries included.

    Args:
        model: Not attached.
        tokenizer: The model's.
        data: One subfolder per domain, see `domains`; or the files of each domain.
        compressors: Names; "full" always runs as well.
        num_slots: Entries that survive a compression, mean over the layers; one number or more.
        chunk_size: Tokens per forward pass.
        max_length: Tokens of a window; the rest of a document makes a shorter one if any of its tokens count.
        max_windows: Windows per domain, one per document in turn; None: all.
        positions: See `attach`.
        budget: See `budgets.slots_for`.
        results: Where rows go as they are done; those that it holds already are not measured again.
        progress: Called with windows done and windows in all, after each.

    Returns:
        One row per domain, compressor and number of slots (None for "full"): task, domain, compressor, num_slots,
        chunk_size, max_length, tokens, nll (nats per token), gap (nll minus the full cache's), gap_low and gap_high
        (95 %, bootstrap over windows), and per window window_tokens, window_nll and window_gap, from which other
        differences can be computed; and run, see `results`.

    Raises:
        ArgumentError: If no token would count, or a number or name is out of range.
        DocumentError: If a document cannot be read or a domain holds none that is long enough.
    """
    if max_length <= 2 * chunk_size:
        raise ArgumentError(
            f"windows of {max_length} tokens have none beyond the second chunk of {chunk_size}; raise max_length"
        )
    if max_windows is not None and max_windows < 1:
        raise ArgumentError(f"max_windows must be at least 1, got {max_windows}")
    limit = window_of(model)
    if limit is not None and max_length > limit:
        raise ArgumentError(
            f"windows of {max_length} tokens are longer than the {limit} that the full cache was trained for, "
            "so there is nothing to compare with; lower max_length"
        )
    check_labels(["full", *compressors])
    attached_with = partial(attach, model, chunk_size=chunk_size, positions=positions)
    # The full cache is read once, whatever the numbers of slots.
    attached = {("full", 0): attached_with("full")}
    for slots in dict.fromkeys(num_slots):
        for name in dict.fromkeys(compressors):
            if name != "full":
                spread = slots_for(model, tokenizer, budget, compressor=name, num_slots=slots, chunk_size=chunk_size)
                # Refuses a wrong name or number before an hour of work.
                attached[name, slots] = attached_with(name, num_slots=slots, slots_per_layer=spread)
    corpus = {
        domain: list(islice(windows_of(tokenizer, files, max_length, 2 * chunk_size + 1), max_windows))
        for domain, files in (domains(data) if isinstance(data, Path) else data).items()
    }
    for domain, windows in corpus.items():
        if not windows:
            raise DocumentError(f"domain {domain!r} has no document of more than {2 * chunk_size} tokens")
    results = Results() if results is None else results
    total, done = sum(map(len, corpus.values())) * len(attached), 0
    rows: list[Row] = []
    for domain, windows in corpus.items():
        full: list[float] = []
        for (name, slots), attachment in attached.items():
            settings = {
                "task": "perplexity",
                "domain": domain,
                "compressor": label(name),
                "num_slots": slots or None,
                "chunk_size": chunk_size,
                "max_length": max_length,
                "positions": positions,
                "budget": budget,
            }

            counted = beyond(progress, done, total)
            measure = partial(_measured, model, attachment, windows, full, counted)
            row = results.measured(settings, measure, of=attachment.fingerprint() + key_of({"windows": windows}))
            full = full or row["window_nll"]
            rows.append(row)
            done += len(windows)
    return rows


def _measured(
    model: PreTrainedModel, attachment: Attachment, windows: Windows, full: list[float], counted: Counted
) -> Row:
    """Score windows; `full` is the full cache's nll of each, [] when that is what is measured."""
    uncounted = 2 * attachment.chunk_size
    nll = []
    with attachment:
        for window in windows:
            scores = score(model, torch.tensor([window]), attachment.new_cache())
            nll.append(-scores[0, uncounted - 1 :].cpu().double().mean().item())
            counted(len(nll))
    counts = [len(window) - uncounted for window in windows]
    gaps = [mine - theirs for mine, theirs in zip(nll, full or nll, strict=True)]
    sums = [gap * count for gap, count in zip(gaps, counts, strict=True)]
    low, high = interval(sums, counts)
    tokens = sum(counts)
    return {
        "tokens": tokens,
        "nll": sum(mine * count for mine, count in zip(nll, counts, strict=True)) / tokens,
        "gap": sum(sums) / tokens,
        "gap_low": low,
        "gap_high": high,
        "window_tokens": counts,
        "window_nll": nll,
        "window_gap": gaps,
    }


def interval(sums: Sequence[float], counts: Sequence[int], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of sum(sums) / sum(counts), resampling their pairs."""
    rng = random.Random(seed)
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.choices(range(len(sums)), k=len(sums))
        means.append(sum(sums[i] for i in drawn) / sum(counts[i] for i in drawn))
    means.sort()
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def mean_interval(rows: Sequence[Row], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of domains' gaps, resampling the windows of each domain.

    Args:
        rows: One per domain, of one compressor, with `window_gap`.
        seed: Of the resampling.
    """
    rng = random.Random(seed)
    means = []
    for _ in range(RESAMPLES):
        total = 0.0
        for row in rows:
            gaps, counts = row["window_gap"], row["window_tokens"]
            drawn = rng.choices(range(len(counts)), k=len(counts))
            total += sum(gaps[i] * counts[i] for i in drawn) / sum(counts[i] for i in drawn)
        means.append(total / len(rows))
    means.sort()
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def difference(rows: Iterable[Row], better: str, worse: str) -> tuple[float, float, float]:
    """Return by how much one compressor's nll is above another's, paired by window, mean of the domains.

    Args:
        rows: Of `evaluate`, on the same windows and for one number of slots.
        better: Name of the compressor that is subtracted.
        worse: Name of the one it is subtracted from.

    Returns:
        The mean difference in nats per token, and the 95 % interval.
    """
    by_domain: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_domain.setdefault(row["domain"], {})[row["compressor"]] = row
    paired: list[Row] = []
    for same in by_domain.values():
        low, high, counts = same[better]["window_nll"], same[worse]["window_nll"], same[better]["window_tokens"]
        gaps = [above - below for above, below in zip(high, low, strict=True)]
        total = sum(gap * count for gap, count in zip(gaps, counts, strict=True))
        paired.append({"window_gap": gaps, "window_tokens": counts, "gap": total / sum(counts)})
    return (sum(row["gap"] for row in paired) / len(paired), *mean_interval(paired))
