"""The verbs that read and answer: plain functions whose signatures and docstrings are their flags and help.

Nothing here imports torch before a verb runs. Every verb checks its files first, then loads the model, then reads.
"""

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lococo.errors import ArgumentError
from lococo.files import check_exists, check_not_input, check_output, text_of
from lococo.options import AnswerOptions, ModelOptions, SlotOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

CONTEXT = "a context that `lococo compress` wrote"


def demo(*, model: ModelOptions, json: bool = False) -> None:
    """Read a long text in few slots, ask about it, and ask the full cache the same.

    Args:
        model: Which model reads.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    from lococo.demo import show

    result = show(model, human(json))
    if json:
        print(jsonlib.dumps(result))


def run(
    files: list[str], *, ask: str, model: ModelOptions, slots: SlotOptions, answer: AnswerOptions, json: bool = False
) -> None:
    """Read documents and answer one question about them.

    Args:
        files: Text, Markdown, source, HTML or PDF; - for standard input. Several are read one after the other.
        ask: The question.
        model: Which model reads.
        slots: What the text is read into.
        answer: How the answer is written.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    _check_question(ask)
    text = text_of(files)
    from lococo.session import opened

    with opened(model, slots, compiled=answer.compiled) as session:
        cache = session.slots.new_cache()
        reading = session.read(cache, text)
        result = session.figures(cache, len(reading.token_ids))
        result["tokens_per_second"] = round(reading.tokens_per_second, 1)
        result["answer"] = _streamed(session.answer(cache, ask, answer), human(json))
    print(_summary(result), file=sys.stderr)
    if json:
        print(jsonlib.dumps(result))


def compress(
    files: list[str], *, output: str, model: ModelOptions, slots: SlotOptions, force: bool = False, json: bool = False
) -> None:
    """Read documents once and save what the slots keep, to be asked many times.

    Args:
        files: Text, Markdown, source, HTML or PDF; - for standard input. Several are read one after the other.
        output: The context file to write, such as book.safetensors.
        model: Which model reads.
        slots: What the text is read into.
        force: Replace an older file of that name.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    if slots.compressor == "full":
        raise ArgumentError("compressor 'full' makes no slots that could be saved; choose another, such as mass-merge")
    path = Path(output).expanduser()
    check_output(path, force=force)
    check_not_input(path, files)
    text = text_of(files)
    from lococo.cache import SlotCache
    from lococo.session import opened
    from lococo.storage import save_context

    with opened(model, slots) as session:
        cache = session.slots.new_cache()
        assert isinstance(cache, SlotCache)  # only "full" makes another
        reading = session.read(cache, text)
        # The check above is minutes old.
        check_output(path, force=force)
        save_context(path, cache, model=session.model, tokenizer=session.tokenizer, token_ids=reading.token_ids)
        result = session.figures(cache, len(reading.token_ids))
    result.update(tokens_per_second=round(reading.tokens_per_second, 1), path=str(path), nbytes=path.stat().st_size)
    print(f"{_summary(result)}\nsaved as {path}", file=human(json))
    if json:
        print(jsonlib.dumps(result))


def ask(
    context: str,
    question: str,
    *,
    heads_folder: str | None = None,
    model: ModelOptions,
    answer: AnswerOptions,
    json: bool = False,
) -> None:
    """Answer a question from a context; the file itself stays as it is.

    Args:
        context: A file that `lococo compress` wrote; its model and settings are used.
        question: The question.
        heads_folder: Of the heads it was made with, if not the one it was.
        model: Where the model is, if not under the name it had.
        answer: How the answer is written.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    _check_question(question)
    path = Path(context).expanduser()
    check_exists(path, CONTEXT)
    from lococo.session import resumed

    with resumed(path, model, heads_folder=heads_folder, compiled=answer.compiled) as (session, cache, token_ids, _):
        result = session.figures(cache, len(token_ids))
        result["answer"] = _streamed(session.answer(cache, question, answer), human(json))
    if json:
        print(jsonlib.dumps(result))


def chat(
    *,
    context: str | None = None,
    heads_folder: str | None = None,
    model: ModelOptions,
    slots: SlotOptions,
    answer: AnswerOptions,
) -> None:
    """Talk without end at constant memory; /stats shows the figures, /quit leaves.

    Args:
        context: Begin from a file that `lococo compress` wrote, with its settings instead of those below.
        heads_folder: Of the heads that file was made with, if not the one it was.
        model: Which model talks.
        slots: What the conversation is read into.
        answer: How answers are written.
    """
    path = None if context is None else Path(context).expanduser()
    if path is not None:
        check_exists(path, CONTEXT)
    from lococo.chat import talk
    from lococo.session import opened, resumed

    if path is None:
        with opened(model, slots, compiled=answer.compiled) as session:
            talk(session, session.slots.new_cache(), answer, after="opening")
    else:
        with resumed(path, model, heads_folder=heads_folder, compiled=answer.compiled) as (session, cache, _, _):
            talk(session, cache, answer, after="document")


def inspect(
    context: str,
    *,
    picture: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    heads_folder: str | None = None,
    model: ModelOptions,
    json: bool = False,
) -> None:
    """Show which tokens the slots of a context keep, as a table and a picture.

    Args:
        context: A file that `lococo compress` wrote.
        picture: The SVG file to write; beside the context by default.
        layer: List the kept tokens of one head of this layer, in order.
        head: The key/value head to list; 0 by default.
        heads_folder: Of the heads it was made with, if not the one it was.
        model: Where the model is, if not under the name it had.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    path = Path(context).expanduser()
    check_exists(path, CONTEXT)
    if head is not None and layer is None:
        raise ArgumentError(f"--head {head} needs the layer it is in; add --layer N")
    target = Path(picture).expanduser() if picture else path.with_name(path.name + ".svg")
    from lococo import inspect_context
    from lococo.session import resumed

    if layer is None:
        inspect_context.check_picture(target)
    with resumed(path, model, heads_folder=heads_folder) as (session, cache, token_ids, info):
        kept = inspect_context.kept_of(cache)
    ids = token_ids.tolist()
    if layer is not None:
        chosen = inspect_context.head_of(kept, layer, head or 0)
        result = inspect_context.show_head(chosen, ids, session.tokenizer, human(json))
    else:
        result = inspect_context.show(kept, info, ids, session.tokenizer, target, human(json))
    if json:
        print(jsonlib.dumps(result))


def human(json: bool) -> TextIO:
    """Return where text for people goes: stdout, unless that is kept for JSON."""
    return sys.stderr if json else sys.stdout


def _check_question(question: str) -> None:
    if not question.strip():
        raise ArgumentError("the question is empty; ask something")
    try:
        question.encode()
    except UnicodeEncodeError:  # Python hands on a byte that it cannot read as half a surrogate pair
        raise ArgumentError("the question is not UTF-8; set the terminal's encoding to it, or leave that out") from None


def _streamed(pieces: "Iterable[str]", file: TextIO) -> str:
    """Print text as it comes, and return all of it."""
    said = []
    for piece in pieces:
        said.append(piece)
        print(piece, end="", file=file, flush=True)
    print(file=file)
    return "".join(said)


def _summary(result: dict[str, Any]) -> str:
    """Put what was read and held into one line."""
    from lococo.progress import mib

    slots = f"{result['num_slots']:,.0f} slots ({result['compressor']})" if result["num_slots"] else "the full cache"
    line = f"read {result['tokens']:,} tokens at {result['tokens_per_second']:,.0f} tokens/s in {slots}: "
    line += f"{mib(result['kv_nbytes'])} of keys and values"
    if result["num_slots"]:
        line += f", where the full cache would hold {mib(result['full_kv_nbytes'])}"
    return line
