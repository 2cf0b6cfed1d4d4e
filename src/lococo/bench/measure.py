"""Measure reading and decoding: every measurement in a process of its own, compressors taking turns.

Run as a module it is one measurement: it reads a `Setting` as JSON from standard input and prints its figures as JSON.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lococo.errors import LococoError

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]

FIGURES = (
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "time_to_first_token_s",
    "peak_memory_bytes",
    "kv_bytes",
)


@dataclass(frozen=True)
class Setting:
    """What one process measures.

    Attributes:
        compressor: Name of the compressor; "full" reads the text in one forward pass, which is its fastest.
        length: Tokens of the prompt.
        num_slots: Slots per layer.
        chunk_size: Tokens per forward pass.
        dtype: Of the model.
        device: Of the model; None: where it loads.
        model: See `load_model`.
        decode_tokens: Tokens decoded after the prompt.
        exact_memory: Take and give back memory in the pieces that tensors ask for. The allocator otherwise keeps what
            was freed, between 15 and 45 MiB of it from run to run, and is faster for it.
    """

    compressor: str
    length: int
    num_slots: int = 512
    chunk_size: int = 256
    dtype: str = "float32"
    device: str | None = None
    model: str | None = None
    decode_tokens: int = 32
    exact_memory: bool = False


def bench(settings: Sequence[Setting], *, repeats: int = 5, progress: Callable[[int], None] | None = None) -> list[Row]:
    """Measure settings of one length against each other.

    Args:
        settings: Run one after the other in each round, so that a slow minute of the machine meets all of them.
        repeats: Rounds.
        progress: Called with the number of measurements done.

    Returns:
        One row per setting: its fields, the median of every figure, and per figure the smallest and largest value
        under "spread".

    Raises:
        LococoError: If a measurement fails; the message is the process's own.
    """
    measured: list[list[Row]] = [[] for _ in settings]
    for turn in range(repeats * len(settings)):
        which = turn % len(settings)
        measured[which].append(measure_in_new_process(settings[which]))
        if progress is not None:
            progress(turn + 1)
    return [
        asdict(setting)
        | {figure: median(row[figure] for row in rows) for figure in FIGURES}
        | {"repeats": repeats, "spread": {f: [min(r[f] for r in rows), max(r[f] for r in rows)] for f in FIGURES}}
        for rows, setting in zip(measured, settings, strict=True)
    ]


def table(rows: Sequence[Row]) -> "Table":
    """Lay the medians out for people, with how they compare to the first setting of the same length."""
    from rich.table import Table

    from lococo.progress import mib

    made = Table("tokens", "compressor", title="medians; factors are to the first compressor of the same length")
    for heading in ("read tokens/s", "decode tokens/s", "first token s", "peak memory", "keys and values"):
        made.add_column(heading, justify="right")
    first: dict[int, Row] = {}
    for row in rows:
        base = first.setdefault(row["length"], row)
        speeds = [f"{row[f]:,.1f} ({row[f] / base[f]:.2f}x)" for f in FIGURES[:2]]
        memory = [mib(row[f]) for f in FIGURES[3:]]
        made.add_row(f"{row['length']:,}", row["compressor"], *speeds, f"{row[FIGURES[2]]:,.1f}", *memory)
    return made


def measure_in_new_process(setting: Setting) -> Row:
    """Run `measure` in a fresh process, so that no measurement finds the memory of another."""
    # Read by glibc when a process starts: from this size on, memory is mapped piece by piece.
    exact = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)} if setting.exact_memory else {}
    process = subprocess.run(
        [sys.executable, "-m", "lococo.bench.measure"],
        input=json.dumps(asdict(setting)),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | exact,
    )
    if process.returncode != 0:
        last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise LococoError(f"measuring {setting.compressor} at {setting.length} tokens failed: {last[0]}")
    figures: Row = json.loads(process.stdout.splitlines()[-1])
    return figures


def measure(setting: Setting) -> Row:
    """Read a prompt, decode a few tokens, and return the figures.

    Memory is the resident set's peak minus what the loaded and warmed-up model held before the prompt.
    """
    import torch

    from lococo.attachment import attach
    from lococo.cache import SlotCache, kv_nbytes
    from lococo.documents import demo_text, encode_stream
    from lococo.models import load_model
    from lococo.reader import prefill

    model, tokenizer = load_model(setting.model, dtype=setting.dtype, device=setting.device)
    ids = torch.tensor([list(islice(_forever(encode_stream, tokenizer, demo_text()), setting.length))])
    options = {"num_slots": setting.num_slots, "chunk_size": setting.chunk_size}
    with attach(model, setting.compressor, **options) as slots, torch.no_grad():  # type: ignore[arg-type]
        # As far as the first compression, so that all code has run once.
        prefill(model, ids[:, : setting.num_slots + 2 * setting.chunk_size], slots.new_cache())
        gc.collect()
        before = _reset_peak(model.device)
        cache = slots.new_cache()
        start = time.perf_counter()
        if isinstance(cache, SlotCache):
            logits = prefill(model, ids, cache)
        else:
            logits = model(ids.to(model.device), past_key_values=cache, logits_to_keep=1).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        token.tolist()
        read = time.perf_counter()
        steps = []
        for _ in range(setting.decode_tokens):
            begun = time.perf_counter()
            token = prefill(model, token, cache).argmax(-1, keepdim=True)
            token.tolist()
            steps.append(time.perf_counter() - begun)
        peak = _peak(model.device) - before
    return {
        "prefill_tokens_per_s": setting.length / (read - start),
        "decode_tokens_per_s": 1 / median(steps),
        "time_to_first_token_s": read - start,
        "peak_memory_bytes": peak,
        "kv_bytes": kv_nbytes(cache),
    }


def _forever(encode: Callable[..., Iterator[list[int]]], tokenizer: Any, text: str) -> Iterator[int]:
    while True:
        for piece in encode(tokenizer, [text]):
            yield from piece


def _reset_peak(device: Any) -> int:
    """Forget the memory peak so far; return the bytes held now."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # What was freed but not given back would be used again without a trace, and longer prompts leave more of it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak(device)


def _peak(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    """Return a memory field of this process in bytes, from Linux's /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps(measure(Setting(**json.load(sys.stdin)))))
