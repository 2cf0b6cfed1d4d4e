"""Time per token behind texts of several lengths: with slots it is the same, however much was read.

    python -m lococo.bench.far book.txt far.jsonl --lengths [32768,65536,131072] --model SmolLM2-135M-Instruct-32K

The text is read once, and what the cache holds at each length is kept. Then all of these read the same tokens on,
taking turns, so that a slow minute of the machine meets each of them; lengths are compared within a round. Figures
come as JSON, one object per line.
"""

import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lococo.attachment import attach
from lococo.bench.measure import beginnings
from lococo.cache import fork, kv_nbytes
from lococo.errors import ArgumentError
from lococo.eval.metrics import interval
from lococo.files import output_file
from lococo.models import load_model
from lococo.reader import prefill
from lococo.results import key_of, results_file

Row = dict[str, Any]

FIGURES = ("read_s_per_token", "decode_s_per_token")


def behind(
    model: PreTrainedModel, caches: list[Cache], follows: Tensor, *, decode_tokens: int, rounds: int
) -> list[list[Row]]:
    """Read on from each cache in turns, and return each one's seconds per token, round by round.

    Args:
        model: Attached.
        caches: Not changed.
        follows: Read from each, (1 n).
        decode_tokens: Read one by one after it.
        rounds: Each begins with another cache.
    """
    seconds: list[list[Row]] = [[] for _ in caches]
    for turn in range(-1, rounds):
        for place in range(len(caches)):
            which = (turn + place) % len(caches)
            cache = fork(caches[which])
            times = [_now(model)]
            for ids in (follows, *follows[:, :decode_tokens].split(1, 1)):
                prefill(model, ids, cache)
                times.append(_now(model))
            read, *steps = [after - before for before, after in pairwise(times)]
            if turn >= 0:  # in the first one all code runs for the first time
                own = {"read_s_per_token": read / follows.shape[1], "decode_s_per_token": median(steps)}
                seconds[which].append(own)
    return seconds


def _now(model: PreTrainedModel) -> float:
    """Return the time at which all that was asked of the model's device is done."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()


def compared(own: list[Row], first: list[Row]) -> Row:
    """Return a length's medians and, under "ratio", how they compare to another's in the same rounds.

    Each ratio is the median over rounds with its 95 % interval, by bootstrap over rounds; None where these are few.
    """

    def ratio(figure: str) -> list[float | None]:
        ratios = [mine[figure] / other[figure] for mine, other in zip(own, first, strict=True)]
        names = [str(number) for number in range(len(ratios))]
        return [median(ratios), *interval(names, lambda which: median(ratios[number] for number in which))]

    middles = {figure: median(each[figure] for each in own) for figure in FIGURES}
    return middles | {"ratio": {figure: ratio(figure) for figure in FIGURES}}


def main(
    text: str,
    json: str,
    lengths: tuple[int, ...] = (32768, 65536, 131072),
    compressor: str = "auto",
    num_slots: int = 512,
    chunk_size: int = 512,
    tokens: int = 2048,
    decode_tokens: int = 32,
    rounds: int = 15,
    model: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str | None = None,
) -> None:
    """Measure the time per token behind each length of a text, in turns.

    Args:
        text: File with a text of more tokens than the largest length.
        json: File for the figures, one JSON object per line.
        lengths: Tokens read before, in rising order; the first is what the others are compared with.
        compressor: See `lococo bench`.
        num_slots: Mean slots per layer.
        chunk_size: Tokens per forward pass.
        tokens: Read behind each length, the same for all: the text's first.
        decode_tokens: Read one by one behind these.
        rounds: How often each length has its turn.
        model: A hub id, a folder or a GGUF file; the embedded default by default.
        dtype: Floating-point type of the weights.
        device: Where to compute; the CPU by default.
    """
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise ArgumentError(f"expected lengths of 1 or more tokens in rising order, got {list(lengths)}")
    if not 1 <= decode_tokens <= tokens or rounds < 1:
        raise ArgumentError(
            f"expected 1 or more rounds and decode_tokens from 1 to tokens, got {rounds}, {decode_tokens} and {tokens}"
        )
    ids = torch.tensor(beginnings(model, [str(Path(text).expanduser())], max(lengths[-1], tokens)))
    loaded, _ = load_model(model, dtype=dtype, device=device)
    about: Row = {"task": "far", "model": model, "compressor": compressor, "num_slots": num_slots}
    about |= {"chunk_size": chunk_size, "dtype": dtype, "device": device or "cpu", "tokens": tokens}
    about |= {"decode_tokens": decode_tokens, "rounds": rounds}
    with (
        results_file(output_file(json)) as results,
        attach(loaded, compressor, num_slots=num_slots, chunk_size=chunk_size) as slots,
    ):

        def measured() -> list[Row]:
            cache, kept, seen = slots.new_cache(), [], 0
            for length in lengths:
                prefill(loaded, ids[:, seen:length], cache)
                kept.append(fork(cache))
                seen = length
                print(f"{length:,} tokens read", flush=True)
            times = behind(loaded, kept, ids[:, :tokens], decode_tokens=decode_tokens, rounds=rounds)
            return [
                about | {"length": length, "kv_bytes": kv_nbytes(held)} | compared(own, times[0])
                for length, held, own in zip(lengths, kept, times, strict=True)
            ]

        key = key_of(about | {"lengths": list(lengths), "ids": ids.tolist()}) + slots.fingerprint()
        results.together(key, len(lengths), measured)
        for row in results.rows:
            print(row, flush=True)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
