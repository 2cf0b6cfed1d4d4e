"""Retrieval: a key and a value hidden in real text, asked for after it."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lococo.attachment import Attachment, attach, window_of
from lococo.cache import SlotCache, taken
from lococo.corpora import domains, windows_of
from lococo.errors import ArgumentError, DocumentError
from lococo.eval.labels import check_labels, label
from lococo.models import model_id
from lococo.progress import Counted, beyond
from lococo.reader import prefill, stream
from lococo.results import Results, Row, key_of

# The needle lies at so many depths, from the beginning of the text to its end, in turn.
DEPTHS = 10

DIGITS = 5

NAMES = ("Alder", "Birch", "Cedar", "Elm", "Hazel", "Juniper", "Laurel", "Maple", "Rowan", "Willow")
PLACES = ("bridge", "castle", "farm", "gate", "harbour", "house", "mill", "station", "tower", "yard")

NEEDLE = " The secret number of {key} is {value}. Remember it. "
QUESTION = "\n\nQuestion: What is the secret number of {key}?\nAnswer: The secret number of {key} is"


@dataclass(frozen=True)
class Trial:
    """One text with a needle in it.

    Attributes:
        ids: Text, needle and question.
        value: The answer.
        depth: Where the needle lies, 0 to 1.
    """

    ids: list[int]
    value: str
    depth: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Path,
    compressors: Sequence[str],
    num_slots: int = 256,
    chunk_size: int = 256,
    lengths: Sequence[int] = (1024, 2048, 4096, 8000),
    trials: int = 50,
    batch: int = 1,
    seed: int = 0,
    results: Results | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Ask for a hidden number, with the full cache and with each compressor, on the same texts.

    Args:
        model: Not attached.
        tokenizer: The model's.
        data: One subfolder per domain, see `corpora.domains`; the text that hides the needle.
        compressors: Names; "full" always runs as well, on texts that its window holds.
        num_slots: Mean over the layers.
        chunk_size: Tokens per forward pass.
        lengths: Tokens of text, needle and question.
        trials: Per length; the depths take turns.
        batch: Texts that are read into slots side by side, which is faster on a GPU.
        seed: Of keys, values and the order of the texts.
        results: Where rows go as they are done; those that it holds already are not measured again.
        progress: Called with the trials done and all there are.

    Returns:
        One row per length and compressor: task, model, length, compressor, num_slots, chunk_size, trials, accuracy, its
        95 % interval low and high, correct (1 or 0 per trial), by_depth (accuracy), and run, see `results`.

    Raises:
        ArgumentError: If a length leaves no room for text, or nothing that was named can read one.
        DocumentError: If the texts do not suffice.
    """
    if trials < 1:
        raise ArgumentError(f"trials must be at least 1, got {trials}")
    names = ["full", *(name for name in dict.fromkeys(compressors) if name != "full")]
    check_labels(names)
    readers = {length: _readers(model, names, length) for length in lengths}
    attached = {name: attach(model, name, num_slots=num_slots, chunk_size=chunk_size) for name in names}
    made = {length: make_trials(tokenizer, data, length, trials, seed) for length in lengths}
    results = Results() if results is None else results
    total, done = sum(map(len, readers.values())) * trials, 0
    rows: list[Row] = []
    for length, same in made.items():
        for name in readers[length]:
            settings = {
                "task": "needle",
                "model": model_id(model),
                "length": length,
                "compressor": label(name),
                "num_slots": num_slots,
                "chunk_size": chunk_size,
            }

            tell = beyond(progress, done, total)
            measure = partial(_measured, model, tokenizer, attached[name], same, batch, tell)
            texts = key_of({"texts": [trial.ids for trial in same]})
            rows.append(results.measured(settings, measure, of=attached[name].fingerprint() + texts))
            done += trials
    return rows


def _readers(model: PreTrainedModel, names: list[str], length: int) -> list[str]:
    """Return those that can read a text of so many tokens and answer: all, but for "full" beyond the window."""
    limit = window_of(model)
    if limit is None or length + DIGITS + 2 <= limit:
        return names
    if names == ["full"]:
        raise ArgumentError(
            f"texts of {length} tokens leave the full cache's window of {limit}; lower --lengths, or name a compressor"
        )
    return [name for name in names if name != "full"]


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    attachment: Attachment,
    trials: list[Trial],
    batch: int,
    counted: Counted,
) -> Row:
    correct = []
    with attachment:
        size = 1 if attachment.compressor is None else batch
        for start in range(0, len(trials), size):
            same = trials[start : start + size]
            for trial, (ids, cache) in zip(same, _read(model, attachment, same), strict=True):
                answer = stream(model, ids, cache, max_new_tokens=DIGITS + 2)
                found = re.match(r"\s*(\d+)", str(tokenizer.decode(list(answer))))
                correct.append(int(found is not None and found[1] == trial.value))
                counted(len(correct))
    return _figures(correct, [trial.depth for trial in trials])


def _read(model: PreTrainedModel, attachment: Attachment, trials: Sequence[Trial]) -> Iterator[tuple[Tensor, Cache]]:
    """Yield, for each trial, what is left to read and the cache to read it into."""
    cache = attachment.new_cache()
    if len(trials) == 1 or not isinstance(cache, SlotCache):
        yield torch.tensor([trials[0].ids]), cache
        return
    together = min(len(trial.ids) for trial in trials) - 1
    prefill(model, torch.tensor([trial.ids[:together] for trial in trials]), cache)
    for row, trial in enumerate(trials):
        yield torch.tensor([trial.ids[together:]]), taken(cache, [row])


def make_trials(tokenizer: PreTrainedTokenizerBase, data: Path, length: int, trials: int, seed: int = 0) -> list[Trial]:
    """Hide needles in texts of all domains in turn; the same ones for the same seed."""
    draw = random.Random(f"{seed}/{length}")
    parts = []
    for _ in range(trials):
        key = f"the {draw.choice(NAMES)} {draw.choice(PLACES)}"
        value = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        texts = (NEEDLE.format(key=key, value=value), QUESTION.format(key=key))
        needle, question = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        parts.append((value, needle, question))
    room = length - max(len(needle) + len(question) for _, needle, question in parts)
    if room < 1:
        raise ArgumentError(f"{length} tokens leave no room for a text around the needle; raise --lengths")
    by_domain = [windows_of(tokenizer, files, room, room) for files in domains(data).values()]
    in_turn = (window for turn in zip(*map(_endless, by_domain), strict=False) for window in turn if window)
    windows = list(islice(in_turn, trials))
    if len(windows) < trials:
        raise DocumentError(
            f"{data} has {len(windows)} texts of {room} tokens for {trials} trials; lower --trials or --lengths"
        )
    made = []
    for number, ((value, needle, question), window) in enumerate(zip(parts, windows, strict=True)):
        depth = number % DEPTHS / (DEPTHS - 1)
        text = window[: length - len(needle) - len(question)]
        place = round(depth * len(text))
        made.append(Trial([*text[:place], *needle, *text[place:], *question], value, depth))
    return made


def _endless(windows: Any) -> Any:
    """Yield windows, then None for ever, but not beyond any use."""
    return chain(windows, islice(cycle([None]), 10_000))


def _figures(correct: list[int], depths: list[float]) -> Row:
    low, high = wilson(sum(correct), len(correct))
    by_depth: dict[float, list[int]] = {}
    for hit, depth in zip(correct, depths, strict=True):
        by_depth.setdefault(round(depth, 2), []).append(hit)
    return {
        "trials": len(correct),
        "accuracy": sum(correct) / len(correct),
        "low": low,
        "high": high,
        "correct": correct,
        "by_depth": {str(depth): sum(hits) / len(hits) for depth, hits in sorted(by_depth.items())},
    }


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    share = hits / trials
    middle = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    scale = 1 + z * z / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
