"""The verbs of the command line: plain functions whose signatures and docstrings are its flags and help.

Nothing here imports torch before a verb runs. Every verb checks its files first, then loads the model, then reads.
"""

import json as jsonlib
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from lococo.errors import ArgumentError
from lococo.files import check_exists, check_not_input, check_output, rows_file, text_of
from lococo.options import AnswerOptions, ModelOptions, SlotOptions, check_at_least_one
from lococo.train.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXT = "a context that `lococo compress` wrote"


def demo(*, model: ModelOptions, json: bool = False) -> None:
    """Read a long text in few slots, ask about it, and ask the full cache the same.

    Args:
        model: Which model reads.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    from lococo.demo import show

    result = show(model, _human(json))
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

    with opened(model, slots) as session:
        cache = session.slots.new_cache()
        reading = session.read(cache, text)
        result = session.figures(cache, len(reading.token_ids))
        result["tokens_per_second"] = round(reading.tokens_per_second, 1)
        result["answer"] = _streamed(session.answer(cache, ask, answer), _human(json))
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
    print(f"{_summary(result)}\nsaved as {path}", file=_human(json))
    if json:
        print(jsonlib.dumps(result))


def ask(context: str, question: str, *, model: ModelOptions, answer: AnswerOptions, json: bool = False) -> None:
    """Answer a question from a context; the file itself stays as it is.

    Args:
        context: A file that `lococo compress` wrote; its model and settings are used.
        question: The question.
        model: Where the model is, if not under the name it had.
        answer: How the answer is written.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    _check_question(question)
    path = Path(context).expanduser()
    check_exists(path, CONTEXT)
    from lococo.session import resumed

    with resumed(path, model) as (session, cache, token_ids, _):
        result = session.figures(cache, len(token_ids))
        result["answer"] = _streamed(session.answer(cache, question, answer), _human(json))
    if json:
        print(jsonlib.dumps(result))


def chat(*, context: str | None = None, model: ModelOptions, slots: SlotOptions, answer: AnswerOptions) -> None:
    """Talk without end at constant memory; /stats shows the figures, /quit leaves.

    Args:
        context: Begin from a file that `lococo compress` wrote, with its settings instead of those below.
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
        with opened(model, slots) as session:
            talk(session, session.slots.new_cache(), answer, after="opening")
    else:
        with resumed(path, model) as (session, cache, _, _):
            talk(session, cache, answer, after="document")


def inspect(
    context: str,
    *,
    picture: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    model: ModelOptions,
    json: bool = False,
) -> None:
    """Show which tokens the slots of a context keep, as a table and a picture.

    Args:
        context: A file that `lococo compress` wrote.
        picture: The SVG file to write; beside the context by default.
        layer: List the kept tokens of one head of this layer, in order.
        head: The key/value head to list; 0 by default.
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
    with resumed(path, model) as (session, cache, token_ids, info):
        kept = inspect_context.kept_of(cache)
    ids = token_ids.tolist()
    if layer is not None:
        chosen = inspect_context.head_of(kept, layer, head or 0)
        result = inspect_context.show_head(chosen, ids, session.tokenizer, _human(json))
    else:
        result = inspect_context.show(kept, info, ids, session.tokenizer, target, _human(json))
    if json:
        print(jsonlib.dumps(result))


def eval_perplexity(
    *,
    data: str,
    compressor: list[str],
    num_slots: tuple[int, ...] = (512,),
    chunk_size: int = 256,
    max_length: int = 4096,
    max_windows: int | None = None,
    json: str,
    positions: Literal["packed", "original"] = "packed",
    budget: Literal["own", "uniform", "pyramid", "calibrated"] = "own",
    model: ModelOptions,
) -> None:
    """Measure what compression costs in nats per token, on texts of several domains.

    Args:
        data: One subfolder per domain, of .txt or .jsonl files with a `text` field.
        compressor: Names to compare, one or more; the full cache is always measured with them.
        num_slots: Entries that survive a compression, mean over the layers; one number or more.
        chunk_size: Tokens per forward pass.
        max_length: Tokens of a window; tokens from the third chunk on count.
        max_windows: Windows per domain, one of each document in turn; all by default.
        json: File for the results, one JSON object per line; replaced once all are there.
        positions: packed reads texts of any length; original refuses those longer than the model's window.
        budget: How the slots are spread over the layers, at an equal total; own: as learned, or else uniform.
        model: Which model reads.
    """
    check_at_least_one(num_slots=min(num_slots, default=0), chunk_size=chunk_size, max_length=max_length)
    if max_windows is not None:
        check_at_least_one(max_windows=max_windows)
    target = _checked(data, json)
    from lococo.eval import perplexity
    from lococo.progress import counting

    loaded, tokenizer = _loaded(model)
    with rows_file(target) as report, counting("windows") as progress:
        rows = perplexity.evaluate(
            loaded,
            tokenizer,
            data=Path(data).expanduser(),
            compressors=compressor,
            num_slots=num_slots,
            chunk_size=chunk_size,
            max_length=max_length,
            max_windows=max_windows,
            positions=positions,
            budget=budget,
            report=report,
            progress=progress,
        )
    from rich.console import Console

    from lococo.eval.tables import tables

    Console().print(*tables(rows))


def eval_needle(
    *,
    data: str,
    compressor: list[str],
    num_slots: int = 256,
    chunk_size: int = 256,
    lengths: list[int],
    trials: int = 50,
    seed: int = 0,
    json: str,
    model: ModelOptions,
) -> None:
    """Measure retrieval: hide a key and a number in real texts, and ask for the number after them.

    Args:
        data: One subfolder per domain, of .txt or .jsonl files with a `text` field.
        compressor: Names to compare, one or more; the full cache is always measured with them.
        num_slots: Entries that survive a compression, mean over the layers.
        chunk_size: Tokens per forward pass.
        lengths: Tokens of text, needle and question, one number or more.
        trials: Texts per length; ten depths take turns.
        seed: Of keys and numbers.
        json: File for the results, one JSON object per line; replaced once all are there.
        model: Which model reads.
    """
    check_at_least_one(num_slots=num_slots, chunk_size=chunk_size, trials=trials, lengths=min(lengths))
    target = _checked(data, json)
    from rich.console import Console

    from lococo.eval import needle
    from lococo.eval.tables import accuracy_table
    from lococo.progress import counting

    loaded, tokenizer = _loaded(model)
    with rows_file(target) as report, counting("trials") as progress:
        rows = needle.evaluate(
            loaded,
            tokenizer,
            data=Path(data).expanduser(),
            compressors=compressor,
            num_slots=num_slots,
            chunk_size=chunk_size,
            lengths=lengths,
            trials=trials,
            seed=seed,
            report=report,
            progress=progress,
        )
    Console().print(accuracy_table(rows))


def train(
    *,
    output: str,
    data: tuple[str, ...] = (),
    documents: int = 10_000,
    save_every: int = 20,
    logs: str | None = None,
    json: bool = False,
    recipe: Recipe,
    model: ModelOptions,
) -> None:
    """Train compression heads for a model whose own weights stay as they are.

    Args:
        output: Folder for the heads; a training that was stopped goes on from the checkpoint in it.
        data: Folders of .txt or .jsonl files, their subfolders being domains, of which only the part named train is
            read; data sets of the hub such as hf:owner/name or hf:owner/name:subset; Python's own library by default.
        documents: Taken of each data set of the hub, at most.
        save_every: Steps between checkpoints.
        logs: Folder for TensorBoard's logs.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
        recipe: How the heads are trained.
        model: Which model they are for.
    """
    check_at_least_one(save_every=save_every, documents=documents)
    for source in data:
        if not source.startswith("hf:") and not Path(source).expanduser().is_dir():
            raise ArgumentError(f"--data {source}: no such folder; expected one with text files, or hf:owner/name")
    target = Path(output).expanduser()
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"--output {output} is a file; name a folder")
    if (target / "config.json").exists():
        raise ArgumentError(f"--output {output} holds heads already; name another folder, or delete them")
    from lococo.train.progress import final_table, steps
    from lococo.train.run import train as run_training

    loaded, tokenizer = _loaded(model)
    with steps(recipe.steps, None if logs is None else Path(logs).expanduser()) as (say, after_step):
        figures = run_training(
            loaded,
            tokenizer,
            recipe,
            target,
            data=data,
            documents=documents,
            save_every=save_every,
            say=say,
            after_step=after_step,
        )
    from rich.console import Console

    Console(file=_human(json)).print(final_table(figures))
    if json:
        print(jsonlib.dumps(figures))


def ablate(table: str, *, data: str, output: str, json: str, plot: str | None = None, model: ModelOptions) -> None:
    """Train and measure a table of ablations: one part of the heads changed at a time, on the same text.

    Args:
        table: YAML with the common recipe, where heads are measured, and rows; see recipes/ablations.yaml.
        data: One subfolder per domain, of .txt or .jsonl files, with parts named train and val.
        output: Folder for the heads; what is done there already is not done again.
        json: File for the results, one JSON object per line; replaced once all are there.
        plot: Picture to draw of them, such as ablations.svg.
        model: Which model the heads are for.
    """
    path = Path(table).expanduser()
    check_exists(path, "a table of ablations in YAML")
    target = _checked(data, json)
    picture = None if plot is None else Path(plot).expanduser()
    if picture is not None:
        check_output(picture, force=True)
    from rich.console import Console

    from lococo.eval import ablations
    from lococo.eval.plots import plot_ablations
    from lococo.eval.tables import ablation_table

    rows = ablations.read_table(path)
    loaded, tokenizer = _loaded(model)
    with rows_file(target) as report:
        results = ablations.run(
            rows,
            loaded,
            tokenizer,
            data=Path(data).expanduser(),
            output=Path(output).expanduser(),
            report=report,
            say=partial(print, file=sys.stderr),
        )
    made = ablations.summary(results)
    Console().print(ablation_table(made))
    if picture is not None:
        plot_ablations(made, picture)


def bench(
    *,
    lengths: list[int],
    compressor: list[str],
    num_slots: int = 512,
    chunk_size: int = 256,
    repeats: int = 5,
    decode_tokens: int = 32,
    exact_memory: bool = False,
    json: str,
    model: ModelOptions,
) -> None:
    """Measure speed and memory of reading and decoding, compressors taking turns, each in a fresh process.

    Args:
        lengths: Tokens of the prompt, one number or more.
        compressor: Names to compare, one or more; full is transformers' own cache.
        num_slots: Entries that survive a compression, per layer and key/value head.
        chunk_size: Tokens per forward pass.
        repeats: Rounds, of which the medians are taken.
        decode_tokens: Tokens decoded after the prompt.
        exact_memory: Count only what tensors take, not what the allocator keeps of it; slower, so not for speeds.
        json: File for the results, one JSON object per line; replaced once all are there.
        model: Which model reads.
    """
    check_at_least_one(num_slots=num_slots, chunk_size=chunk_size, repeats=repeats, decode_tokens=decode_tokens)
    check_at_least_one(lengths=min(lengths))
    target = Path(json).expanduser()
    check_output(target, force=True)
    from rich.console import Console

    from lococo.bench import measure
    from lococo.progress import counting

    rows: list[dict[str, Any]] = []
    with rows_file(target) as report, counting("measurements") as progress:
        total = len(lengths) * repeats * len(compressor)
        for number, length in enumerate(lengths):
            settings = [
                measure.Setting(
                    name,
                    length,
                    num_slots=num_slots,
                    chunk_size=chunk_size,
                    dtype=model.dtype,
                    device=model.device,
                    model=model.model,
                    decode_tokens=decode_tokens,
                    exact_memory=exact_memory,
                )
                for name in compressor
            ]
            before = number * repeats * len(compressor)
            for row in measure.bench(settings, repeats=repeats, progress=partial(_shifted, progress, before, total)):
                rows.append(row)
                report(row)
    Console().print(measure.table(rows))


def _shifted(progress: "Callable[[int, int], None]", before: int, total: int, done: int) -> None:
    """Report what is done of one length as part of all lengths."""
    progress(before + done, total)


def _checked(data: str, json: str) -> Path:
    """Refuse a folder of texts that is not there, and a file that cannot be written; return the latter."""
    if not Path(data).expanduser().is_dir():
        raise ArgumentError(f"--data {data}: no such folder; expected one with a subfolder per domain")
    target = Path(json).expanduser()
    check_output(target, force=True)
    return target


def _loaded(model: ModelOptions) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from lococo.models import load_model

    return load_model(model.model, dtype=model.dtype, device=model.device, trust_remote_code=model.trust_remote_code)


def _human(json: bool) -> TextIO:
    """Return where text for people goes: stdout, unless that is kept for JSON."""
    return sys.stderr if json else sys.stdout


def _check_question(question: str) -> None:
    if not question.strip():
        raise ArgumentError("the question is empty; ask something")


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
