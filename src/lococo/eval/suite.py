"""A suite: many tasks, every compressor, the full cache beside them, on the same questions."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from lm_eval.evaluator import evaluate as ask
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo import compressors as table
from lococo.attachment import Attachment, attach, window_of
from lococo.errors import ArgumentError, WindowError
from lococo.eval import metrics
from lococo.eval.choice import TaskChoice
from lococo.eval.harness import SlotLM
from lococo.eval.labels import SLOTS, check_labels, label
from lococo.eval.tasks import AbsentError, Task, Tasks, check_name
from lococo.results import Results, Row, key_of

FULL = "full"

# Texts that are read together: the answers to choose from take half as long as one by one.
BATCH = 4


@dataclass(frozen=True)
class Reading:
    """One way of reading.

    Attributes:
        label: What rows call its compressor.
        num_slots: Mean over the layers; None for the full cache.
        trained: Whether heads were trained for it.
        attachment: Reads.
    """

    label: str
    num_slots: int | None
    trained: bool
    attachment: Attachment


def readings(
    model: PreTrainedModel, compressors: Sequence[str], num_slots: Sequence[int], chunk_size: int
) -> list[Reading]:
    """Attach the full cache, and every compressor at every number of slots.

    Args:
        model: Not attached.
        compressors: Names, or folders of heads; "{num_slots}" in one stands for the number of slots.
        num_slots: Entries that survive a compression, mean over the layers; one number or more.
        chunk_size: Tokens per forward pass.

    Raises:
        ArgumentError: If a name or number is out of range, or two folders go by one name.
    """
    made = [Reading(FULL, None, False, attach(model, FULL, chunk_size=chunk_size))]
    names = [name for name in dict.fromkeys(compressors) if name != FULL]
    check_labels([FULL, *names])
    for mean in dict.fromkeys(num_slots):
        for name in names:
            spelt = name.replace(SLOTS, str(mean))
            attachment = attach(model, spelt, num_slots=mean, chunk_size=chunk_size)
            made.append(Reading(label(name), mean, table.is_trained(spelt), attachment))
    return made


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    ways: Sequence[Reading],
    *,
    results: Results | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Ask every task in every way of reading, one row each.

    Args:
        model: Not attached.
        tokenizer: The model's.
        tasks: Of `Tasks.find`.
        ways: Of `readings`.
        results: Where rows go as they are done; those that it holds already are not measured again.
        say: Called with a line about every row.

    Returns:
        Rows with task, shots, length, too_long, compressor, num_slots (None for "full"), chunk_size, trained, metric,
        score, its 95 % interval low and high (bootstrap over documents; None of few), questions, documents (the text
        that each is about), scores (by name, one per question), truncated (prompts that were cut), prompt_tokens (mean
        and largest that were read), and run, see `results`. A task that does not fit the window has one row with
        skipped, the reason.

    Raises:
        ArgumentError: If a task asks for prompts beyond the window.
    """
    results = Results() if results is None else results
    window = window_of(model)
    for task in tasks:
        if window is not None and (task.choice.length or 0) > window:
            raise ArgumentError(
                f"task {task.choice.name}: length {task.choice.length} leaves the full cache's window of {window}"
            )
    first = len(results.rows)
    for number, task in enumerate(tasks, 1):
        key = key_of(task.key())
        for way in ways:
            settings = {
                **_about(task.choice),
                "too_long": task.too_long,
                "compressor": way.label,
                "num_slots": way.num_slots,
                "chunk_size": way.attachment.chunk_size,
                "trained": way.trained,
            }
            measure = partial(_measured, model, tokenizer, task, way.attachment)
            try:
                with quiet():
                    row = results.measured(settings, measure, of=way.attachment.fingerprint() + key)
            except WindowError as error:
                say(skipped(results, task.choice, str(error)))
                break
            how = "" if way.num_slots is None else f", {way.num_slots} slots"
            say(
                f"{number} of {len(tasks)}  {task.choice.name}  {way.label}{how}: {row['metric']} {row['score']:.3f} "
                f"of {row['questions']} questions"
            )
    return results.rows[first:]


def _about(choice: TaskChoice) -> Row:
    return {"task": choice.name, "shots": choice.shots, "length": choice.length}


def skipped(results: Results, choice: TaskChoice, reason: str) -> str:
    """Note that a task could not be asked, and return a line about it."""
    results.add({**_about(choice), "skipped": reason})
    return f"skipped  {choice.name}: {reason}"


def check(choices: Sequence[TaskChoice]) -> None:
    """Refuse names that are no task, and tasks that their rows would not tell apart.

    Raises:
        ArgumentError: Names the task.
    """
    if not choices:
        raise ArgumentError("no task was named; name one or more with --tasks, such as squad")
    seen = set()
    for choice in choices:
        check_name(choice.name)
        if (same := (choice.name, choice.shots, choice.length, choice.too_long)) in seen:
            raise ArgumentError(
                f"task {choice.name} is named twice with the same shots, length and too_long; drop one of the two"
            )
        seen.add(same)


def ready(tasks: Tasks, choices: Sequence[TaskChoice], results: Results, say: Callable[[str], None]) -> list[Task]:
    """Make tasks ready; those whose data is not here, or makes no prompts of that length, are left out and noted."""
    check(choices)
    made = []
    for choice in choices:
        try:
            with quiet():
                made.append(tasks.find(choice))
        except (AbsentError, ArgumentError) as error:
            say(skipped(results, choice, str(error)))
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


def _measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, attachment: Attachment) -> Row:
    reader = SlotLM(
        model,
        tokenizer=tokenizer,
        attachment=attachment,
        too_long=task.too_long,
        max_length=task.choice.length,
        batch_size=BATCH,
    )
    asked = {task.choice.name: task.asked}
    out = ask(reader, asked, limit=len(task.documents), bootstrap_iters=0, log_samples=True)
    samples = sorted(out["samples"][task.choice.name], key=lambda sample: sample["doc_id"])
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    names = [name for name in task.asked.higher_is_better() if isinstance(samples[0].get(name), int | float)]
    scores = {name: [float(sample[name]) for sample in samples] for name in names}
    read = [kept for _, kept in reader.prompts.values()]
    low, high = metrics.interval(task.documents, partial(metrics.overall, task.metric, scores))
    return {
        "metric": task.metric,
        "score": metrics.overall(task.metric, scores),
        "low": low,
        "high": high,
        "questions": len(samples),
        "documents": task.documents,
        "scores": scores,
        "truncated": sum(kept < came for came, kept in reader.prompts.values()),
        "prompt_tokens": {"mean": round(sum(read) / len(read)), "max": max(read)},
    }
