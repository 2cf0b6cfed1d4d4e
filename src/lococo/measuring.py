"""The verbs that train and measure: plain functions whose signatures and docstrings are their flags and help.

Nothing here imports torch before a verb runs. Every verb checks its files first, then loads the model, then measures.
"""

import importlib.util
import json as jsonlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lococo.errors import ArgumentError
from lococo.files import check_exists, check_output
from lococo.options import ModelOptions, check_at_least_one
from lococo.results import results_file
from lococo.train.recipe import Recipe
from lococo.verbs import human

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    check_at_least_one(num_slots=min(num_slots, default=0), chunk_size=chunk_size, max_length=max_length)
    if max_windows is not None:
        check_at_least_one(max_windows=max_windows)
    hub = [source for source in data if source.startswith("hf:")]
    if len(data) > 1 and len(hub) < len(data):
        raise ArgumentError(f"--data {' '.join(data)}: expected one folder, or data sets of the hub")
    target = _output(json) if hub else _checked(data[0], json)
    from lococo.eval import perplexity
    from lococo.progress import counting

    texts = {source: _held_out(source) for source in hub} if hub else Path(data[0]).expanduser()
    loaded, tokenizer = _loaded(model)
    with results_file(target) as results, counting("windows") as progress:
        rows = perplexity.evaluate(
            loaded,
            tokenizer,
            data=texts,
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


# Documents of a data set of the hub that a training takes at most by default, and that an evaluation takes after them.
TRAINING_DOCUMENTS = 10_000
HELD_OUT_DOCUMENTS = 100


def _held_out(source: str) -> "list[Path]":
    """Fetch documents of a data set of the hub that a training with the default settings does not see."""
    from lococo.train.hub import fetch

    return sorted(fetch(source, documents=HELD_OUT_DOCUMENTS, seed=0, skip=TRAINING_DOCUMENTS).iterdir())


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
        json: File for the results, one JSON object per line; replaced once all are there; run again, an
            interrupted measurement goes on.
        model: Which model reads.
    """
    check_at_least_one(num_slots=num_slots, chunk_size=chunk_size, trials=trials, lengths=min(lengths))
    target = _checked(data, json)
    from rich.console import Console

    from lococo.eval import needle
    from lococo.eval.tables import accuracy_table
    from lococo.progress import counting

    loaded, tokenizer = _loaded(model)
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
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"--output {output} is a file; name a folder")
    _check_extra("eval", "lm_eval", "rouge_score")
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars, several for every row
    from rich.console import Console

    from lococo.eval import contamination, suite
    from lococo.eval.tables import suite_tables
    from lococo.eval.tasks import TaskChoice, Tasks

    choices = [TaskChoice.of(task) for task in tasks]
    folder.mkdir(parents=True, exist_ok=True)
    say = partial(print, file=sys.stderr)
    loaded, tokenizer = _loaded(model)
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
    check_at_least_one(num_slots=num_slots, chunk_size=chunk_size, tokens=tokens)
    target = Path(json).expanduser()
    check_output(target, force=True)
    picture = None if plot is None else Path(plot).expanduser()
    if picture is not None:
        check_output(picture, force=True)
        _check_extra("eval", "matplotlib")
    from lococo.files import text_of

    text = text_of(file)
    from itertools import chain, islice

    from lococo.documents import encode_stream
    from lococo.eval import inside, plots
    from lococo.progress import counting

    loaded, tokenizer = _loaded(model)
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


def _pieces(folder: str | None) -> "Iterable[str]":
    """Return the text of a folder, or the demo's, in pieces."""
    from lococo.corpora import texts_of
    from lococo.documents import demo_text

    if folder is None:
        return [demo_text()]
    files = sorted(path for path in Path(folder).expanduser().rglob("*") if path.suffix in (".txt", ".jsonl"))
    return (piece for file in files for text in texts_of(file) for piece in text)


def train(
    *,
    output: str,
    data: tuple[str, ...] = (),
    documents: int = TRAINING_DOCUMENTS,
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
    _check_extra("train", "accelerate", *(["datasets"] if any(s.startswith("hf:") for s in data) else []))
    from lococo.train.progress import final_table, steps
    from lococo.train.run import train as run_training

    loaded, tokenizer = _loaded(model)
    folder = Path(logs).expanduser() if logs is not None and _first_process() else None
    with steps(recipe.steps, folder, quiet=not _first_process()) as (say, after_step):
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
    if not _first_process():
        return
    from rich.console import Console

    Console(file=human(json)).print(final_table(figures))
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

    _check_extra("train", "accelerate")
    if picture is not None:
        _check_extra("eval", "matplotlib")
    from lococo.eval import ablations, plots
    from lococo.eval.tables import ablation_table

    rows = ablations.read_table(path)
    loaded, tokenizer = _loaded(model)
    with results_file(target) as results:
        ablations.run(
            rows,
            loaded,
            tokenizer,
            data=Path(data).expanduser(),
            output=Path(output).expanduser(),
            results=results,
            say=partial(print, file=sys.stderr),
        )
    made = ablations.summary(results.rows)
    Console().print(ablation_table(made))
    if picture is not None:
        plots.save(plots.ablations(made), picture)


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
    from lococo.progress import beyond, counting

    with results_file(target) as results, counting("measurements") as progress:
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
            for row in measure.bench(settings, repeats=repeats, progress=beyond(progress, before, total)):
                results.add(row)
    Console().print(measure.table(results.rows))


def report(results: list[str], *, output: str, baseline: str = "full") -> None:
    """Turn results into one HTML file with tables, plots and intervals, which needs no network.

    Args:
        results: .jsonl files of the other verbs, or folders of them.
        output: The HTML file, replaced if it is there.
        baseline: Compressor that the others are compared with, paired.
    """
    target = Path(output).expanduser()
    check_output(target, force=True)
    sources = [Path(result).expanduser() for result in results]
    _check_extra("eval", "matplotlib")
    from lococo.atomic import write_atomically
    from lococo.eval.report import report as made

    write_atomically(target, made(sources, baseline=baseline).encode())
    print(target)


def _checked(data: str, json: str) -> Path:
    """Refuse a folder of texts that is not there, and a file that cannot be written; return the latter."""
    if not Path(data).expanduser().is_dir():
        raise ArgumentError(f"--data {data}: no such folder; expected one with a subfolder per domain")
    return _output(json)


def _output(json: str) -> Path:
    target = Path(json).expanduser()
    check_output(target, force=True)
    return target


def _first_process() -> bool:
    """Tell whether this process speaks for all that `torchrun` or `accelerate launch` have started."""
    return os.environ.get("RANK", "0") == "0"


def _check_extra(extra: str, *packages: str) -> None:
    """Refuse what needs packages of an extra that are not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ArgumentError(f"this needs {', '.join(missing)}; install `lococo[{extra}]`")


def _loaded(model: ModelOptions) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from lococo.models import load_model

    return load_model(model.model, dtype=model.dtype, device=model.device, trust_remote_code=model.trust_remote_code)
