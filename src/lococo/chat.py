"""A conversation without end: every turn is read into the same slots, so memory stays what it was."""

import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from transformers import Cache

from lococo.options import AnswerOptions
from lococo.progress import mib, resident_nbytes
from lococo.session import Session


def talk(session: Session, cache: Cache, how: AnswerOptions, *, after: str) -> None:
    """Answer lines of standard input until /quit or its end.

    Args:
        session: The model.
        cache: Goes on from what it holds.
        how: How answers are written.
        after: What the cache holds: "document" or "opening" (nothing), see `Prompt.question_ids`.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte must not end a conversation
    if sys.stdin.isatty():
        print("Type a message; /stats shows the figures, /quit or Ctrl-D leaves, Ctrl-C stops an answer.")
    while (line := _next_line()) is not None:
        if line == "/quit":
            return
        if line == "/stats":
            print(_stats(session, cache))
        elif line:
            _answer(session, cache, line, how, after)
            after = "answer"


def _next_line() -> str | None:
    """Return what the user types next, without surrounding space; None at the end."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() line editing and a history
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None


def _answer(session: Session, cache: Cache, line: str, how: AnswerOptions, after: str) -> None:
    # Between two tokens the cache is whole, in the middle of one it is not. So Ctrl-C only asks to stop.
    with _asked_to_stop() as stop:
        for piece in session.answer(cache, line, how, after=after):
            print(piece, end="", flush=True)
            if stop:
                print(" [stopped]", end="")
                break
    print()


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising; the second one raises all the same."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _stats(session: Session, cache: Cache) -> str:
    figures = session.figures(cache, cache.seen if hasattr(cache, "seen") else cache.get_seq_length())
    slots = f"{figures['num_slots']:,.0f} slots" if figures["num_slots"] else "the full cache"
    return (
        f"{figures['tokens']:,} tokens so far in {slots}: {mib(figures['kv_nbytes'])} of keys and values "
        f"(full cache: {mib(figures['full_kv_nbytes'])}), {mib(resident_nbytes())} of memory in all"
    )
