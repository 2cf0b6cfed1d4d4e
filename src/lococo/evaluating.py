"""The verbs that measure: plain functions whose signatures and docstrings are their flags and help.

Nothing here imports torch before a verb runs. Every verb checks its files first, then loads the model, then measures.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lococo.errors import ArgumentError
from lococo.files import output_file, output_of_texts
from lococo.options import ModelOptions, check_at_least_one, check_extra, check_named, plot_file
from lococo.results import results_file
from lococo.train.recipe import TRAINING_DOCUMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Documents of a data set of the hub that an evaluation takes.
HELD_OUT_DOCUMENTS = 100


def eval_perplexity(
    *,
    data: list[str],
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
        data: One subfolder per domain, of .txt or .jsonl files with a `text` field; or data sets of the hub such as
            hf:owner/name or hf:owner/name:subset, of which the documents are taken that follow the 10,000 of a training
            with seed 0.
        compressor: Names to compare, one or more; the full cache is always measured with them.
        num_slots: Entries that survive a compression, mean over the layers; one number or more.
        chunk_size: Tokens per forward pass.
        max_length: Tokens of a window; tokens from the third chunk on count.
        max_windows: Windows per domain, one of each document in turn; all by default.
        json: File for the results, one JSON object per line; replaced once all are there; run again, an
            interrupted measurement goes on.
        positions: packed reads texts of any length; original refuses those longer than the model's window.
        budget: How the slots are spread over the layers, at an equal total; own: as learned, or else uniform.
        model: Which model reads.
    """
    check_named(compressor=compressor)
    check_at_least_one(num_slots=min(num_slots, default=0), chunk_size=chunk_size, max_length=max_length)
    if max_windows is not None:
        check_at_least_one(max_windows=max_windows)
    target, texts = _texts_of(data, json)
    from lococo.eval import perplexity
    from lococo.progress import counting

    files = texts()
    loaded, tokenizer = model.load()
    with results_file(target) as results, counting("windows") as progress:
        rows = perplexity.evaluate(
            loaded,
            tokenizer,
            data=files,
            compressors=compressor,
            num_slots=num_slots,
            chunk_size=chunk_size,
            max_length=max_length,
            max_windows=max_windows,
            positions=positions,
            budget=budget,
            results=results,
            progress=progress,
        )
    from rich.console import Console

    from lococo.eval.tables import tables

    Console().print(*tables(rows))


def eval_positions(
    *,
    data: list[str],
    compressor: list[str],
    lengths: list[int],
    num_slots: int = 512,
    chunk_size: int = 256,
    max_documents: int = 4,
    batch: int = 1,
    models: tuple[str, ...] = (),
    json: str,
    plot: str | None = None,
    positions: Literal["packed", "original"] = "packed",
    model: ModelOptions,
) -> None:
    """Measure predictions by place in the text, far beyond the window, without the full cache to compare with.

    Args:
        data: One subfolder per domain, of .txt or .jsonl files with a `text` field; or data sets of the hub such as
            hf:owner/name or hf:owner/name:subset, of which the documents are taken that follow the 10,000 of a training
            with seed 0.
        compressor: Names to compare, one or more; full reads no further than the window.
        lengths: Where parts of a text end, in tokens, one number or more; each part is measured by itself.
        num_slots: Entries that survive a compression, mean over the layers.
        chunk_size: Tokens per forward pass.
        max_documents: Documents per domain, the first of those that are as long as the largest length.
        batch: Documents of the same length to read side by side, which is faster on a GPU.
        models: More models to read the same documents, one after the other.
        json: File for the results, one JSON object per line; replaced once all are there; run again, an
            interrupted measurement goes on.
        plot: Picture to draw of them, such as positions.svg.
        positions: packed reads texts of any length; original no further than the model's window.
        model: Which model reads.
    """
    check_named(lengths=lengths, compressor=compressor)
    check_at_least_one(num_slots=num_slots, chunk_size=chunk_size, max_documents=max_documents, batch=batch)
    check_at_least_one(lengths=min(lengths))
    target, texts = _texts_of(data, json)
    picture = plot_file(plot)
    from rich.console import Console

    from lococo.eval import plots
    from lococo.eval import positions as measuring
    from lococo.eval.tables import positions_tables
    from lococo.progress import counting

    with results_file(target) as results, counting("tokens") as progress:
        for using in (model, *(replace(model, model=name) for name in models)):
            loaded, tokenizer = using.load()
            measuring.evaluate(
                loaded,
                tokenizer,
                data=texts(),
                compressors=compressor,
                num_slots=num_slots,
                chunk_size=chunk_size,
                lengths=lengths,
                max_documents=max_documents,
                batch=batch,
                positions=positions,
                results=results,
                progress=progress,
            )
            del loaded, tokenizer  # before the next one is loaded
    made = measuring.summary(results.rows)
    Console().print(*positions_tables(made))
    if picture is not None:
        plots.save(plots.positions(made), picture)


def eval_needle(
    *,
    data: str,
    compressor: list[str],
    num_slots: int = 256,
    chunk_size: int = 256,
    lengths: list[int],
    trials: int = 50,
    batch: int = 1,
    seed: int = 0,
    json: str,
    model: ModelOptions,
) -> None:
    """Measure retrieval: hide a key and a number in real texts, and ask for the number after them.

    Args:
        data: One subfolder per domain, of .txt or .jsonl files with a `text` field.
        compressor: Names to compare, one or more; the full cache is always measured with them, as far as its window
            goes.
        num_slots: Entries that survive a compression, mean over the layers.
        chunk_size: Tokens per forward pass.
        lengths: Tokens of text, needle and question, one number or more.
        trials: Texts per length; ten depths take turns.
        batch: Texts to read into slots side by side, which is faster on a GPU.
        seed: Of keys and numbers.
        json: File for the results, one JSON object per line; replaced once all are there; run again, an
            interrupted measurement goes on.
        model: Which model reads.
    """
    check_named(lengths=lengths, compressor=compressor)
    check_at_least_one(num_slots=num_slots, chunk_size=chunk_size, trials=trials, batch=batch, lengths=min(lengths))
    target = output_of_texts(data, json)
    from rich.console import Console

    from lococo.eval import needle
    from lococo.eval.tables import accuracy_table
    from lococo.progress import counting

    loaded, tokenizer = model.load()
    with results_file(target) as results, counting("trials") as progress:
        rows = needle.evaluate(
            loaded,
            tokenizer,
            data=Path(data).expanduser(),
            compressors=compressor,
            num_slots=num_slots,
            chunk_size=chunk_size,
            lengths=lengths,
            trials=trials,
            batch=batch,
            seed=seed,
            results=results,
            progress=progress,
        )
    Console().print(accuracy_table(rows))


def eval_suite(
    *,
    tasks: list[Any],
    compressor: list[str],
    num_slots: tuple[int, ...] = (512,),
    chunk_size: int = 256,
    output: str,
    data_dir: str | None = None,
    text: str | None = None,
    trained_on: tuple[str, ...] = (),
    limit: int | None = None,
    model: ModelOptions,
) -> None:
    """Measure many tasks with the full cache and with every compressor, on the same questions.

    Args:
        tasks: Names, one or more; in a recipe also mappings with name, shots, limit, per_document, length and too_long.
        compressor: Names to compare, one or more, {num_slots} in a folder's name standing for their number; the full
            cache is always measured with them.
        num_slots: Entries that survive a compression, mean over the layers; one number or more.
        chunk_size: Tokens per forward pass.
        output: Folder for suite.jsonl, replaced once all is measured; run again, an interrupted suite goes on.
        data_dir: Folder of local copies, one subfolder per benchmark; by default data sets are fetched from the hub.
        text: Folder of .txt and .jsonl files to hide things in; Python's own documentation by default.
        trained_on: Folders of texts that heads were trained on, searched for the questions that are asked.
        limit: Most questions per task; a recipe may say less for one.
        model: Which model reads.
    """
    check_at_least_one(num_slots=min(num_slots, default=0), chunk_size=chunk_size)
    if limit is not None:
        check_at_least_one(limit=limit)
    for name, given in (("data-dir", data_dir), ("text", text), *(("trained-on", each) for each in trained_on)):
        if given is not None and not Path(given).expanduser().is_dir():
            raise ArgumentError(f"--{name} {given}: no such folder")
    from lococo.corpora import texts_in

    for given in (text, *trained_on):
        if given is not None:
            texts_in(Path(given).expanduser())
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"--output {output} is a file; name a folder")
    check_extra("eval", "lm_eval", "rouge_score")
    check_named(compressor=compressor)
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars, several for every row
    from rich.console import Console

    from lococo.eval import contamination, suite
    from lococo.eval.choice import TaskChoice
    from lococo.eval.tables import suite_tables
    from lococo.eval.tasks import Tasks

    choices = [TaskChoice.of(task) for task in tasks]
    suite.check(choices)
    folder.mkdir(parents=True, exist_ok=True)
    say = partial(print, file=sys.stderr)
    loaded, tokenizer = model.load()
    ways = suite.readings(loaded, compressor, num_slots, chunk_size)
    copies = None if data_dir is None else Path(data_dir).expanduser()
    known = Tasks(tokenizer, data=copies, text=partial(_pieces, text), limit=limit)
    with results_file(folder / "suite.jsonl") as results:
        ready = suite.ready(known, choices, results, say)
        for corpus in trained_on:
            contamination.warn(ready, Path(corpus).expanduser(), results, say)
        suite.evaluate(loaded, tokenizer, ready, ways, results=results, say=say)
    Console().print(*suite_tables(results.rows))


def eval_inside(
    file: list[str],
    *,
    compressor: list[str],
    num_slots: int = 512,
    chunk_size: int = 256,
    tokens: int = 8192,
    json: str,
    plot: str | None = None,
    model: ModelOptions,
) -> None:
    """Look inside the slots while a text is read: where attention goes, what survives, how it ages.

    Args:
        file: Documents to read, one or more, one after the other.
        compressor: Names to compare, one or more.
        num_slots: Entries that survive a compression, mean over the layers.
        chunk_size: Tokens per forward pass.
        tokens: How many are read at most.
        json: File for the results, one JSON object per compressor; replaced once all are there.
        plot: Picture to draw of them, such as inside.svg.
        model: Which model reads.
    """
    check_named(compressor=compressor)
    check_at_least_one(num_slots=num_slots, chunk_size=chunk_size, tokens=tokens)
    target = output_file(json)
    picture = plot_file(plot)
    from lococo.files import text_of

    text = text_of(file)
    from itertools import chain, islice

    from lococo.eval import inside, plots
    from lococo.progress import counting
    from lococo.tokenization import encode_stream

    loaded, tokenizer = model.load()
    ids = list(islice(chain.from_iterable(encode_stream(tokenizer, text.pieces)), tokens))
    with results_file(target) as results, counting("tokens") as progress:
        rows = inside.evaluate(
            loaded,
            tokenizer,
            ids,
            compressors=compressor,
            num_slots=num_slots,
            chunk_size=chunk_size,
            results=results,
            progress=progress,
        )
    if picture is not None:
        plots.save(plots.inside(rows), picture)


def report(results: list[str], *, output: str, baseline: str = "full") -> None:
    """Turn results into one HTML file with tables, plots and intervals, which needs no network, or into Markdown.

    Args:
        results: .jsonl files of the other verbs, or folders of them.
        output: The HTML file, replaced if it is there; only the tables if its name ends in .md.
        baseline: Compressor that the others are compared with, paired.
    """
    target = output_file(output)
    sources = [Path(result).expanduser() for result in results]
    check_extra("eval", "matplotlib")
    from lococo.atomic import write_atomically
    from lococo.eval.report import report as made

    form: Literal["html", "md"] = "md" if target.suffix == ".md" else "html"
    write_atomically(target, made(sources, baseline=baseline, form=form).encode())
    print(target)


def _texts_of(data: list[str], json: str) -> "tuple[Path, Callable[[], Path | dict[str, list[Path]]]]":
    """Return the file for results, and what fetches the texts: a folder, or files by data set of the hub."""
    check_named(data=data)
    hub = [source for source in data if source.startswith("hf:")]
    if len(data) > 1 and len(hub) < len(data):
        raise ArgumentError(f"--data {' '.join(data)}: expected one folder, or data sets of the hub")
    target = output_file(json) if hub else output_of_texts(data[0], json)
    return target, lambda: {source: _held_out(source) for source in hub} if hub else Path(data[0]).expanduser()


def _held_out(source: str) -> "list[Path]":
    """Fetch documents of a data set of the hub that a training with the default settings does not see."""
    from lococo.train.hub import fetch

    return sorted(fetch(source, documents=HELD_OUT_DOCUMENTS, seed=0, skip=TRAINING_DOCUMENTS).iterdir())


def _pieces(folder: str | None) -> "Iterable[str]":
    """Return the text of a folder, or the demo's, in pieces."""
    from lococo.corpora import texts_in, texts_of
    from lococo.documents import demo_text

    if folder is None:
        return [demo_text()]
    return (piece for file in texts_in(Path(folder).expanduser()) for text in texts_of(file) for piece in text)
