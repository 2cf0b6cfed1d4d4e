"""The first thing to try: a text longer than the model's window, read in few slots, and the full cache beside it."""

from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from transformers import Cache

from lococo.documents import demo_text
from lococo.files import Text
from lococo.options import AnswerOptions, ModelOptions, SlotOptions
from lococo.progress import mib, resident_nbytes
from lococo.reader import prefill
from lococo.session import Session, opened

# From Python's own language reference. The slots read past the 8,192 tokens of the default model's window; the full
# cache gets the end of the same text, as much of it as fits and two slow cores read in half a minute.
CHARACTERS = 43_800
FULL_CHARACTERS = 22_000
QUESTION = "What does the break statement do?"  # a topic near the end, which both have read
SLOTS = SlotOptions(num_slots=512)
FULL = SlotOptions(compressor="full")
ANSWER = AnswerOptions(max_new_tokens=64)


def show(model: ModelOptions, file: TextIO) -> dict[str, Any]:
    """Read the demo text in slots and with the full cache, ask both the same, and print what was seen.

    Args:
        model: Which model reads.
        file: Where to print.

    Returns:
        The figures and answers of both, as JSON takes them.
    """
    console = Console(file=file, highlight=False)
    text = demo_text()[:CHARACTERS]
    console.print("A long text: Python's language reference, as `help()` has it. First the model is loaded.")
    with opened(model, SLOTS) as session:
        # Weights are mapped from the file: they count as memory only once a first token went through them.
        prefill(session.model, session.prompt.question_ids("Hello", after="opening"), session.slots.new_cache())
        resident = resident_nbytes()
        name = session.figures(session.slots.new_cache(), 0)["compressor"]
        console.print(f"\n[bold]1. In {SLOTS.num_slots} slots[/], with {name}:")
        slots = _run(session, session.slots.new_cache(), text, resident, file)
        loaded = session.model, session.tokenizer
    console.print("\n[bold]2. With the full cache[/], which holds every token, the second half of the same text:")
    with opened(model, FULL, loaded=loaded) as session:
        full = _run(session, session.slots.new_cache(), text[-FULL_CHARACTERS:], resident, file)
    console.print()
    console.print(_table(slots, full))
    console.print(_what_it_means(slots))
    return {"slots": slots, "full": full}


def _run(session: Session, cache: Cache, text: str, resident: int, file: TextIO) -> dict[str, Any]:
    reading = session.read(cache, Text([text], len(text.encode())))
    figures = session.figures(cache, len(reading.token_ids))
    figures["tokens_per_second"] = round(reading.tokens_per_second, 1)
    figures["memory_nbytes"] = max(0, reading.peak_resident - resident)
    print(f"   {len(reading.token_ids):,} tokens read. {QUESTION}\n   ", end="", file=file, flush=True)
    said = []
    for piece in session.answer(cache, QUESTION, ANSWER):
        said.append(piece)
        print(piece.replace("\n", "\n   "), end="", file=file, flush=True)
    print(file=file)
    figures["question"], figures["answer"] = QUESTION, "".join(said)
    return figures


def _table(slots: dict[str, Any], full: dict[str, Any]) -> Table:
    table = Table("", "slots", "full cache")
    for column in table.columns[1:]:
        column.justify = "right"
    both = (slots, full)
    table.add_row("tokens read", *(f"{one['tokens']:,}" for one in both))
    table.add_row("entries held per layer", f"{slots['num_slots']:,.0f} + {slots['chunk_size']}", f"{full['tokens']:,}")
    table.add_row("keys and values held", *(mib(one["kv_nbytes"]) for one in both))
    table.add_row("  a full cache of this text", *(mib(one["full_kv_nbytes"]) for one in both))
    table.add_row("tokens read per second", *(f"{one['tokens_per_second']:,.0f}" for one in both))
    table.add_row("memory beside the model, at most", *(mib(one["memory_nbytes"]) for one in both))
    return table


def _what_it_means(slots: dict[str, Any]) -> str:
    per_token = slots["full_kv_nbytes"] / slots["tokens"]
    return (
        f"The slots hold {mib(slots['kv_nbytes'])} however much is read; the full cache grows by "
        f"{mib(per_token * 1000)} with every thousand tokens, and ends where the model's window ends. What the slots "
        "dropped is gone: where their answer is the worse one, that is the price (a small model errs without them, "
        "too). `lococo eval perplexity` measures it. Next: lococo run FILE --ask QUESTION"
    )
