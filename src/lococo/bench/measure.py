"""Measure reading and decoding: every measurement in a process of its own, ways of reading taking turns.

A process runs `main`: it is told by JSON on standard input what to measure, and prints the figures as JSON.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import lococo
from lococo.bench.peers import PEERS, python_of
from lococo.bench.readers import Setting, with_slots
from lococo.bench.roofline import machine, share_of
from lococo.errors import ArgumentError, LococoError

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]

# Makes this package, and nothing that lies beside it, known to a Python that may be another environment's.
START = """
import importlib.util as util, pathlib, sys
file = pathlib.Path(sys.argv[1])
spec = util.spec_from_file_location("lococo", file, submodule_search_locations=[str(file.parent)])
sys.modules["lococo"] = package = util.module_from_spec(spec)
spec.loader.exec_module(package)
from lococo.bench.measure import main
main(sys.argv[2])
"""

FIGURES = (
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "time_to_first_token_s",
    "peak_memory_bytes",
    "kv_bytes",
    "decode_p95_s",
)

# So long is decoded, `Setting.most_decoded` allowing: a few fast steps say little about a machine that others share.
DECODE_SECONDS = 2.0


def bench(
    settings: Sequence[Setting],
    texts: Sequence[Sequence[int]],
    *,
    repeats: int = 5,
    progress: Callable[[int], None] | None = None,
    each_round: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Measure settings of one dtype against each other, and the machine beside them.

    Args:
        settings: Run one after the other in each round, so that a slow minute of the machine meets all of them.
        texts: Prompts and what follows them begin these; each round has another one, in turn.
        repeats: Rounds.
        progress: Called with the number of measurements done.
        each_round: Called after every round with the rows of all rounds so far.

    Returns:
        One row per setting: its fields, the median of every figure, per figure the smallest and largest value under
        "spread", under "nll" the mean nats per token (None where nothing was scored), the bytes and operations that
        were counted, and under "roofline" the medians of the machine's bandwidth and arithmetic, measured right after
        each of the setting's measurements, of the tokens per second that it could read and decode at best by them, and
        of the shares of these that were reached; None where that is not known. A setting that failed, for want of
        memory say, is not tried again; its row has under "failed" why, and the figures of the rounds before, or None.

    Raises:
        LococoError: If nothing could be measured; the message is the last process's own.
    """
    measured: list[list[Row]] = [[] for _ in settings]
    failed: dict[int, str] = {}
    rows: list[Row] = []
    for turn in range(repeats):
        for number, setting in enumerate(settings):
            ids = texts[turn % len(texts)][: setting.length + setting.scored_tokens]
            if number not in failed:
                try:
                    row = measure_in_new_process(setting, ids)
                    # Beside it, since what a machine can do changes from minute to minute where it is shared.
                    limits = in_new_process("machine", {"dtype": setting.dtype, "device": setting.device})
                    measured[number].append(row | {"roofline": _roofline(row, setting, limits)})
                except LococoError as error:
                    failed[number] = str(error)
                    if len(failed) == len(settings) and not any(measured):
                        raise
            if progress is not None:
                progress(turn * len(settings) + number + 1)
        rows = [
            (_medians(setting, each) if each else asdict(setting) | dict.fromkeys((*FIGURES, "nll")))
            | ({"failed": failed[number]} if number in failed else {})
            for number, (setting, each) in enumerate(zip(settings, measured, strict=True))
        ]
        if each_round is not None:
            each_round(rows)
    return rows


def _medians(setting: Setting, measured: list[Row]) -> Row:
    told = [row["nll"] for row in measured if row["nll"] is not None]
    spread = {f: [min(r[f] for r in measured), max(r[f] for r in measured)] for f in FIGURES}
    limits = [row["roofline"] for row in measured]
    roofline = {name: None if limits[0][name] is None else median(each[name] for each in limits) for name in limits[0]}
    return (
        asdict(setting)
        | {figure: median(row[figure] for row in measured) for figure in FIGURES}
        | {"nll": mean(told) if told else None, "repeats": len(measured)}
        | {"spread": spread | ({"nll": [min(told), max(told)]} if told else {})}
        | {counted: measured[0][counted] for counted in ("weight_bytes", "operations")}
        | {"roofline": roofline}
    )


def _roofline(row: Row, setting: Setting, limits: Row) -> Row:
    """Return what the machine could do at best, and which share of it a measurement reached."""
    operations, weights = row["operations"], row["weight_bytes"]
    tokens = setting.batch * setting.length
    reading = None if operations is None else limits["operations_per_s"] * tokens / operations
    decoding = None if weights is None else limits["bytes_per_s"] * setting.batch / (weights + row["kv_bytes"])
    best = {"prefill_tokens_per_s": reading, "decode_tokens_per_s": decoding}
    return (
        best | {share_of(name): None if limit is None else row[name] / limit for name, limit in best.items()} | limits
    )


def table(rows: Sequence[Row]) -> "Table":
    """Lay the medians out for people, with how they compare to the first setting of the same length."""
    from rich.table import Table

    from lococo.eval.labels import with_rows
    from lococo.progress import mib

    made = Table("tokens", "compressor", title="medians; factors are to the first row of the same length")
    headings = (
        "read tokens/s",
        "of roofline",
        "decode tokens/s",
        "of roofline",
        "p95 ms",
        "first token s",
        "peak memory",
    )
    scored = any(row["nll"] is not None for row in rows)
    for heading in (*headings, "keys and values", *(["nats per token"] if scored else [])):
        made.add_column(heading, justify="right")
    first: dict[int, Row] = {}
    for row in rows:
        if row[FIGURES[0]] is None:
            made.add_row(f"{row['length']:,}", with_rows(row), row["failed"])
            continue
        base = first.setdefault(row["length"], row)
        speeds = []
        for figure in FIGURES[:2]:
            share = row["roofline"][share_of(figure)]
            speeds += [f"{row[figure]:,.1f} ({row[figure] / base[figure]:.2f}x)"]
            speeds += ["" if share is None else f"{share:.0%}"]
        memory = [mib(row[f]) for f in FIGURES[3:5]]
        nll = [] if not scored else ["" if row["nll"] is None else f"{row['nll']:.3f}"]
        waited = f"{1e3 * row['decode_p95_s']:,.0f}", f"{row['time_to_first_token_s']:,.1f}"
        made.add_row(f"{row['length']:,}", with_rows(row), *speeds, *waited, *memory, *nll)
    return made


def measure_in_new_process(setting: Setting, ids: Sequence[int]) -> Row:
    """Run `measure` in a fresh process, so that no measurement finds the memory of another.

    Raises:
        LococoError: If it fails; the message ends with the process's last line.
    """
    from lococo.models import files_of

    peer = PEERS.get(setting.compressor)
    python = None
    if peer is not None and peer.apart:
        python, setting = python_of(peer.needs), replace(setting, model=files_of(setting.model))
    try:
        asked = {"setting": asdict(setting), "ids": list(ids)}
        return in_new_process("reading", asked, python=python, exact_memory=setting.exact_memory)
    except LococoError as error:
        raise LococoError(f"measuring {setting.compressor} at {setting.length} tokens failed: {error}") from error


def in_new_process(what: str, asked: Row, *, python: Path | None = None, exact_memory: bool = False) -> Row:
    """Run `main` in a fresh process, and return the figures that it prints.

    Raises:
        LococoError: If it fails; the message is the process's last line, or the signal that killed it.
    """
    # Read by glibc when a process starts: from this size on, memory is mapped piece by piece.
    exact = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)} if exact_memory else {}
    process = subprocess.run(
        [str(python or sys.executable), "-c", START, str(Path(lococo.__file__)), what],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | exact,
    )
    if process.returncode < 0:  # what it said last is no reason
        raise LococoError(f"killed by signal {-process.returncode}, for want of memory perhaps")
    if process.returncode != 0:
        last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise LococoError(last[0])
    figures: Row = json.loads(process.stdout.splitlines()[-1])
    return figures


def measure(setting: Setting, ids: Sequence[int]) -> Row:
    """Read a prompt, decode a few tokens, and return the figures, those per second of all rows together.

    Memory is the resident set's peak while reading, minus what the loaded and warmed-up model held before; keys and
    values that were taken before count.

    Args:
        setting: What to measure.
        ids: The prompt, and behind it what is scored.
    """
    ids, follows = ids[: setting.length], ids[setting.length :]
    peer = PEERS.get(setting.compressor)
    with (with_slots if peer is None else peer.opened)(setting) as reader:
        # As far as the first compression, so that all code has run once.
        reader.step(reader.read(ids[: setting.num_slots + 2 * setting.chunk_size]))
        reader.forget()
        gc.collect()
        before = reset_peak(reader.device_type)
        start = time.perf_counter()
        token = reader.read(ids)
        read = time.perf_counter()
        peak = peak_memory(reader.device_type) - before
        kv_bytes, work = reader.kv_bytes(), reader.work(len(ids))
        peak += kv_bytes if reader.taken_at_once else 0
        nll = reader.score(follows) if follows else None
        steps: list[float] = []
        while len(steps) < setting.decode_tokens or (len(steps) < setting.most_decoded and sum(steps) < DECODE_SECONDS):
            begun = time.perf_counter()
            token = reader.step(token)
            steps.append(time.perf_counter() - begun)
    return {
        "nll": nll,
        "prefill_tokens_per_s": setting.batch * len(ids) / (read - start),
        "decode_tokens_per_s": setting.batch / median(steps),
        "decode_p95_s": sorted(steps)[math.ceil(0.95 * len(steps)) - 1],
        "time_to_first_token_s": read - start,
        "peak_memory_bytes": peak,
        "kv_bytes": kv_bytes,
        "weight_bytes": work.weight_bytes,
        "operations": work.operations,
    }


def prompt(model: str | None, length: int, *, trust_remote_code: bool = False) -> list[int]:
    """Return so many tokens of the demo's text, again and again."""
    from lococo.documents import demo_text
    from lococo.models import load_tokenizer
    from lococo.tokenization import encode_stream

    tokenizer, text = load_tokenizer(model, trust_remote_code=trust_remote_code), demo_text()
    pieces = (piece for _ in itertools.count() for piece in encode_stream(tokenizer, [text]))
    return list(itertools.islice(itertools.chain.from_iterable(pieces), length))


def beginnings(
    model: str | None, files: Sequence[str], length: int, *, trust_remote_code: bool = False
) -> list[list[int]]:
    """Return so many tokens of the beginning of each text.

    Raises:
        ArgumentError: If a text is shorter; says what it has.
    """
    from lococo.documents import read_text
    from lococo.models import load_tokenizer
    from lococo.tokenization import encode_stream

    tokenizer, made = load_tokenizer(model, trust_remote_code=trust_remote_code), []
    for file in files:
        pieces = encode_stream(tokenizer, read_text(file))
        ids = list(itertools.islice(itertools.chain.from_iterable(pieces), length))
        if len(ids) < length:
            raise ArgumentError(f"{file} has {len(ids):,} tokens, and {length:,} are to be read; give a longer text")
        made.append(ids)
    return made


def reset_peak(device_type: str) -> int:
    """Forget the memory peak so far, see `peak_memory`; return the bytes held now."""
    if device_type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What was freed but not given back would be used again without a trace, and longer prompts leave more of it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return peak_memory(device_type)


def peak_memory(device_type: str) -> int:
    """Return the most bytes that were held at a time since `reset_peak`."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
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


def _settle_on(device: str | None) -> None:
    """Make a GPU that is named by its number the one whose memory and time are looked at."""
    if device is not None and device.startswith("cuda:"):
        import torch

        torch.cuda.set_device(device)


def main(what: str) -> None:
    """Measure what standard input asks for, a reading, a step of tuning or the machine; print the figures as JSON."""
    asked = json.load(sys.stdin)
    _settle_on(asked.get("setting", asked).get("device"))
    if what == "machine":
        measured = machine(**asked)
    elif what == "tuning":
        from lococo.bench.tuning import step

        measured = step(**asked)
    else:
        measured = measure(Setting(**asked["setting"]), asked["ids"])
    print(json.dumps(measured))
