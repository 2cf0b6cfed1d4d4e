"""A suite: many tasks, every compressor, the full cache beside them, on the same questions."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate as ask
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.attachment import Attachment, attach
from lococo.errors import WindowError
from lococo.eval import metrics
from lococo.eval.harness import SlotLM
from lococo.eval.tasks import AbsentError, Task, TaskChoice, Tasks
from lococo.results import Results, Row, key_of

RESAMPLES = 2000


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    compressors: Sequence[str],
    num_slots: Sequence[int],
    chunk_size: int = 256,
    results: Results | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Ask every task with the full cache and with each compressor, one row each.

    Args:
        model: Not attached.
        tokenizer: The model's.
        tasks: Of `Tasks.find`.
        compressors: Names, or folders of heads; "{num_slots}" in one stands for the number of slots. "full" always
            runs as well.
        num_slots: Entries that survive a compression, mean over the layers; one number or more.
        chunk_size: Tokens per forward pass.
        results: Where rows go as they are done; those that it holds already are not measured again.
        say: Called with a line about every row.

    Returns:
        Rows with task, shots, compressor, num_slots (None for "full"), chunk_size, too_long, length, metric, score,
        its 95 % interval low and high (bootstrap over documents), questions, documents (the text that each is about),
        scores (by name, one per question), truncated (prompts that were cut), prompt_tokens (mean and largest), and
        run, see `results`. A task that does not fit the window has one row with skipped, the reason.

    Raises:
        ArgumentError: If a name or number is out of range.
    """
    results = Results() if results is None else results
    with quiet():
        return _rows(model, tokenizer, tasks, compressors, num_slots, chunk_size, results, say)


def _rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    compressors: Sequence[str],
    num_slots: Sequence[int],
    chunk_size: int,
    results: Results,
    say: Callable[[str], None],
) -> list[Row]:
    attached: dict[tuple[str, int | None], Attachment] = {("full", None): attach(model, "full", chunk_size=chunk_size)}
    for mean in dict.fromkeys(num_slots):
        for name in dict.fromkeys(compressors):
            if name != "full":
                spelt = name.replace("{num_slots}", str(mean))
                attached[name, mean] = attach(model, spelt, num_slots=mean, chunk_size=chunk_size)
    first = len(results.rows)
    for number, task in enumerate(tasks, 1):
        for (name, slots), attachment in attached.items():
            settings = {
                "task": task.choice.name,
                "shots": task.choice.shots,
                "compressor": _label(name),
                "num_slots": slots,
                "chunk_size": chunk_size,
                "too_long": task.too_long,
                "length": task.choice.length,
            }
            measure = partial(_measured, model, tokenizer, task, attachment)
            try:
                row = results.measured(settings, measure, of=attachment.fingerprint() + key_of(_asked(task)))
            except WindowError as error:
                say(skipped(results, task.choice.name, str(error)))
                break
            how = "" if slots is None else f", {slots} slots"
            say(
                f"{number} of {len(tasks)}  {task.choice.name}  {row['compressor']}{how}: {row['metric']} "
                f"{row['score']:.3f} of {row['questions']} questions"
            )
    return results.rows[first:]


def skipped(results: Results, task: str, reason: str) -> str:
    """Note that a task could not be asked, and return a line about it."""
    results.add({"task": task, "skipped": reason})
    return f"skipped  {task}: {reason}"


def ready(tasks: Tasks, choices: Sequence[TaskChoice], results: Results, say: Callable[[str], None]) -> list[Task]:
    """Make tasks ready; those whose data is not here are left out, which is noted."""
    for choice in choices:
        tasks.check(choice.name)
    made = []
    for choice in choices:
        try:
            with quiet():
                made.append(tasks.find(choice))
        except AbsentError as error:
            say(skipped(results, choice.name, str(error)))
    return made


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from saying for every row how they were called."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _label(name: str) -> str:
    """Return how a compressor is called in rows: for heads in a folder, the folder's name alone."""
    return Path(name.replace("-{num_slots}", "")).name


def _asked(task: Task) -> Row:
    """Return all that decides what the model is asked."""
    choice = task.choice
    documents = list(task.asked.eval_docs)[: len(task.documents)]
    examples = list(task.asked.fewshot_docs())[: choice.shots] if choice.shots else []
    return {"documents": documents, "examples": examples, "metric": task.metric, "too_long": task.too_long}


def _measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, attachment: Attachment) -> Row:
    reader = SlotLM(
        model, tokenizer=tokenizer, attachment=attachment, too_long=task.too_long, max_length=task.choice.length
    )
    asked = {task.choice.name: task.asked}
    out = ask(reader, asked, limit=len(task.documents), bootstrap_iters=0, log_samples=True)
    samples = sorted(out["samples"][task.choice.name], key=lambda sample: sample["doc_id"])
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    names = [name for name in task.asked.higher_is_better() if isinstance(samples[0].get(name), int | float)]
    scores = {name: [float(sample[name]) for sample in samples] for name in names}
    lengths = [len(tokenizer(_prompt(sample))["input_ids"]) for sample in samples]
    low, high = interval(task.metric, scores, task.documents)
    return {
        "metric": task.metric,
        "score": metrics.overall(task.metric, scores),
        "low": low,
        "high": high,
        "questions": len(samples),
        "documents": task.documents,
        "scores": scores,
        "truncated": reader.truncated,
        "prompt_tokens": {"mean": round(sum(lengths) / len(lengths)), "max": max(lengths)},
    }


def _prompt(sample: Mapping[str, Any]) -> str:
    return str(sample["arguments"][0][0])


def interval(
    metric: str, scores: Mapping[str, Sequence[float]], documents: Sequence[str], *, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a score, resampling documents with all questions about them."""
    of: dict[str, list[int]] = {}
    for number, document in enumerate(documents):
        of.setdefault(document, []).append(number)
    groups = list(of.values())
    rng = random.Random(seed)
    drawn = (rng.choices(groups, k=len(groups)) for _ in range(RESAMPLES))
    sampled = sorted(metrics.overall(metric, scores, [i for group in some for i in group]) for some in drawn)
    return sampled[int(0.025 * RESAMPLES)], sampled[int(0.975 * RESAMPLES) - 1]
