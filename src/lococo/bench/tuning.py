"""Memory and time of one step of tuning by the length of its window; with slots memory and time per token stay.

    python -m lococo.bench.tuning texts tuning.jsonl --lengths [8192,16384,32768,65536] --compressor [auto,full]

Each step runs in a process of its own. The full cache reads its window in one forward pass, which is how one tunes
without slots. Figures come as JSON, one object per line.
"""

import gc
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lococo.bench.measure import in_new_process, peak_memory, reset_peak
from lococo.errors import ArgumentError, LococoError
from lococo.files import output_file
from lococo.results import key_of, results_file
from lococo.train.extension import FULL, Extension

Row = dict[str, Any]

FIGURES = ("peak_memory_bytes", "seconds")


def step(recipe: Row, data: str, model: str | None, dtype: str, device: str | None) -> Row:
    """Take one step, after a shorter one that made all that stays, and return the figures.

    Memory is the peak minus what weights, gradients and Adam's moments held before; `measure.measure` says of what.

    Args:
        recipe: Fields of `Extension`; length is that of the window.
        data: Text, with a document that is as long.
        model: See `load_model`.
        dtype: Of the weights.
        device: Of the weights.
    """
    import torch

    from lococo.models import load_model
    from lococo.train.data import corpus_of
    from lococo.train.extend import tuning_of
    from lococo.train.long_lessons import LongLessons
    from lococo.train.packing import check_longest

    asked = replace(Extension(**recipe), steps=2)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    part, held_out = corpus_of([data], tokenizer, documents=1, seed=asked.seed)
    corpus = part.joined(held_out)  # nothing is held out: the only long document may lie there
    check_longest(corpus, asked.length)
    chunk = min(asked.chunk_size, 256)
    short = replace(asked, steps=1, chunk_size=chunk, length=-(-asked.num_slots // chunk) * chunk + 2 * chunk)
    training, tuning = tuning_of(loaded, corpus, short)
    training.run(lambda row: None)
    training.schedule, training.lessons = asked, LongLessons(loaded, tuning.compressor, corpus, asked)
    gc.collect()
    kind = loaded.device.type
    before, start = reset_peak(kind), time.perf_counter()
    training.run(lambda row: None)
    if kind == "cuda":
        torch.cuda.synchronize()
    return {"peak_memory_bytes": peak_memory(kind) - before, "seconds": time.perf_counter() - start}


def main(
    data: str,
    json: str,
    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536),
    compressor: tuple[str, ...] = ("auto", FULL),
    num_slots: int = 512,
    chunk_size: int = 256,
    compressions: int = 2,
    model: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str | None = None,
) -> int:
    """Measure memory and time of one step of tuning at each length; one that fails, for want of memory say, is told so.

    Run again, an interrupted measurement goes on.

    Args:
        data: Folder of text, see `lococo extend`, with a document as long as the largest length.
        json: File for the figures, one JSON object per line.
        lengths: Tokens of a window, one number or more.
        compressor: auto, full, or others that `lococo extend` takes.
        num_slots: Mean slots per layer.
        chunk_size: Tokens per forward pass, but for full.
        compressions: How many compressions back the gradient reaches.
        model: A hub id, a folder or a GGUF file; the embedded default by default.
        dtype: Floating-point type of the weights.
        device: Where to compute; the CPU by default.

    Returns:
        0; 1 if no step could be measured.
    """
    if not lengths or not compressor:
        raise ArgumentError("expected lengths and compressors, one or more of each")
    of_model = {"data": str(Path(data).expanduser()), "model": model, "dtype": dtype, "device": device}
    slots: Row = {"num_slots": num_slots, "compressions": compressions}
    recipes = [
        Extension(compressor=name, length=length, chunk_size=length if name == FULL else chunk_size, **slots)
        for length in lengths
        for name in compressor
    ]
    with results_file(output_file(json)) as results:
        for recipe in recipes:
            row: Row = {"task": "tuning-memory", "dtype": dtype, "device": device or "cpu"}
            row |= {name: getattr(recipe, name) for name in ("compressor", "length", "num_slots", "chunk_size")}
            of_step = of_model | {"recipe": asdict(recipe)}
            try:
                results.measured(row, partial(in_new_process, "tuning", of_step), of=key_of(of_step))
            except LococoError as error:
                results.add(row | dict.fromkeys(FIGURES) | {"failed": str(error)[:200]})
            print(results.rows[-1], flush=True)
    return int(all("failed" in row for row in results.rows))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    sys.exit(auto_cli(main))
