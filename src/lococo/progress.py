"""What a long read shows on stderr while it runs; nothing where stderr is not a terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Cache

from lococo.cache import SlotCache, kv_nbytes

# Characters handed to the tokenizer at a time, so that the share of a file that was encoded is known.
SLICE_CHARS = 1 << 14


class ReadingProgress:
    """Counts bytes of text, tokens made of them and tokens read, and tells a bar.

    The number of tokens in a text is known only at its end. Until then it is estimated from the tokens that the part
    encoded so far came to.
    """

    def __init__(self, cache: Cache, total_bytes: int | None, bar: Progress | None, task: TaskID | None) -> None:
        self.cache = cache
        self.total_bytes = total_bytes
        self.bar = bar
        self.task = task
        self.bytes = 0
        self.encoded = 0
        self.read = 0
        self.total: int | None = None
        self.peak_resident = resident_nbytes()

    def feed(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass text on, counting it."""
        for piece in pieces:
            for start in range(0, len(piece), SLICE_CHARS):
                part = piece[start : start + SLICE_CHARS]
                self.bytes += len(part.encode("utf-8", "replace"))
                yield part

    def encode(self, lists: Iterable[list[int]]) -> Iterator[list[int]]:
        """Pass token ids on, counting them."""
        for ids in lists:
            self.encoded += len(ids)
            if self.total_bytes:
                share = min(1.0, self.bytes / self.total_bytes)
                self.total = max(self.encoded, round(self.encoded / share)) if share else None
            yield ids
        self.total = self.encoded

    def advance(self, tokens: int) -> None:
        """Count tokens that were read, and show it."""
        self.read += tokens
        resident = resident_nbytes()
        self.peak_resident = max(self.peak_resident, resident)
        if self.bar is None or self.task is None:
            return
        elapsed = self.bar.tasks[self.task].elapsed or 0.0
        self.bar.update(
            self.task,
            completed=self.read,
            total=self.total,
            rate=f"{self.read / elapsed:,.0f} tokens/s" if elapsed else "",
            held=_held(self.cache),
            memory=f"{mib(kv_nbytes(self.cache))} KV, {mib(resident)} in all",
        )


@contextmanager
def reading(cache: Cache, total_bytes: int | None = None) -> Iterator[ReadingProgress]:
    """Show a bar while a text is read into a cache, if stderr is a terminal.

    Args:
        cache: That is filled.
        total_bytes: Size of the text in UTF-8, if known.
    """
    if not sys.stderr.isatty():
        yield ReadingProgress(cache, total_bytes, None, None)
        return
    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,.0f} tokens, {task.fields[rate]}, {task.fields[held]}, {task.fields[memory]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    # Transient: what stays on the screen is the answer and one line of figures.
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield ReadingProgress(cache, total_bytes, bar, bar.add_task("", total=None, rate="", held="", memory=""))


def _held(cache: Cache) -> str:
    if not isinstance(cache, SlotCache):
        return "all kept"
    layers = [layer for layer in cache.slot_layers if layer.is_initialized]
    filled = sum(max(layer.filled) for layer in layers) / max(1, len(layers))
    return f"{min(filled, cache.num_slots):,.0f}/{cache.num_slots:,.0f} slots"


Counted = Callable[[int], None]


def beyond(progress: Callable[[int, int], None] | None, before: int, total: int) -> Counted:
    """Return what counts the pieces of one part of the work, of which `before` are done in other parts."""

    def counted(done: int) -> None:
        if progress is not None:
            progress(before + done, total)

    return counted


# Between lines of long work where stderr is no terminal.
LINE_SECONDS = 60.0


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, elsewhere a line a minute; yields what takes things done and all there are."""
    if not sys.stderr.isatty():
        said = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                print(f"{done:,} of {total:,} {what}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + what),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def resident_nbytes() -> int:
    """Return the memory that this process holds now; where the system does not say, the most it ever held."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * resource.getpagesize()


def mib(nbytes: float) -> str:
    """Write a number of bytes for people."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if nbytes >= size:
            value = nbytes / size
            return f"{value:,.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{nbytes / 1024:,.0f} KiB"
