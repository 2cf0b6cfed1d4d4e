"""Tasks made ready to be asked: those of lm-evaluation-harness and ours, on local copies or data sets of the hub.

A local copy only takes the place of the data set of a task of lm-evaluation-harness.
"""

import difflib
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerBase

from lococo.errors import ArgumentError, DocumentError, LococoError
from lococo.eval import copies, metrics, ruler
from lococo.eval.choice import TaskChoice, TooLong
from lococo.eval.copies import Document
from lococo.eval.kinds import KINDS, Kind

LONGBENCH = "longbench_"

# Takes a description's own data out of it.
NO_DATA = {"training_split": None, "validation_split": None, "dataset_path": "json", "dataset_name": None}

# Of prompts that are made, with their answers, where nothing else is said.
SYNTHETIC_TOKENS = 1024
SYNTHETIC_EXAMPLES = 50

# How long the hub may take to answer.
HUB_SECONDS = 5


class AbsentError(DocumentError):
    """A task whose data is not here, or not enough of it; a suite goes on without it."""


@dataclass(frozen=True)
class Task:
    """A task that is ready to be asked.

    Attributes:
        choice: What was asked for.
        asked: The task, as lm-evaluation-harness takes it.
        metric: The score that counts.
        too_long: See `TaskChoice`.
        documents: Names the text that each question is about.
        rows: Examples and questions as they were read.
    """

    choice: TaskChoice
    asked: Any
    metric: str
    too_long: TooLong
    documents: list[str] = field(default_factory=list)
    rows: list[Document] = field(default_factory=list)

    def key(self) -> dict[str, object]:
        """Return all that decides what the model is asked and how answers are scored."""
        described = ("doc_to_text", "doc_to_target", "doc_to_choice", "generation_kwargs", "target_delimiter")
        config = self.asked.config
        return {
            "rows": self.rows,
            "metric": self.metric,
            "how": [str(getattr(config, name, None)).partition(" at 0x")[0] for name in described],
            "versions": [importlib.metadata.version("lm_eval"), metrics.REVISION],
        }


def check_name(name: str) -> None:
    """Refuse a name that is no task.

    Raises:
        ArgumentError: Suggests the nearest one.
    """
    if name not in KINDS and name not in _manager().all_subtasks:
        nearest = difflib.get_close_matches(name, [*KINDS, *_manager().all_subtasks], 1, 0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ArgumentError(
            f"unknown task {name!r}; expected one of {', '.join(KINDS)}, or one of lm-evaluation-harness{hint}"
        )


class Tasks:
    """Finds tasks by name."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, data: Path | None, text: Callable[[], Any], limit: int | None
    ) -> None:
        """Look for local copies in `data`, and hide what is to be found in `text`.

        Args:
            tokenizer: Of the model.
            data: Folder with a subfolder per local copy; None: data sets of the hub.
            text: Returns pieces of text, for synthetic tasks.
            limit: Most questions per task, where it does not say less itself.
        """
        self.tokenizer, self.data, self.text, self.limit = tokenizer, data, text, limit

    def find(self, choice: TaskChoice) -> Task:
        """Make a task ready.

        Raises:
            ArgumentError: If there is no task of that name.
            AbsentError: If its data is not here, or too little of it.
            DocumentError: If a file of it is malformed.
        """
        check_name(choice.name)
        kind = KINDS.get(choice.name)
        if kind is None:
            return self._of_the_hub(choice, None)
        if choice.name in ruler.FAMILIES:
            return self._ours(choice, kind, self._synthetic(choice))
        if self.data is None:
            return (
                self._ours(choice, kind, self._fetched(choice, kind)) if kind.ours else self._of_the_hub(choice, kind)
            )
        documents = self._local(choice, kind)
        if kind.ours:
            return self._ours(choice, kind, documents)
        return self._task(choice, kind, {**_config_of(choice.name), **NO_DATA}, documents)

    def _most(self, choice: TaskChoice) -> int | None:
        """Return how many questions are asked at most; None: all."""
        return min((limit for limit in (choice.limit, self.limit) if limit is not None), default=None)

    def _local(self, choice: TaskChoice, kind: Kind) -> list[Document]:
        assert self.data is not None
        folder = self.data / (kind.folder or choice.name)
        if kind.read is None:
            raise AbsentError(f"{choice.name}: no local copy of it can be read; leave --data-dir out to fetch it")
        try:
            return kind.read(folder)
        except FileNotFoundError as error:
            missing = Path(error.filename or error.args[0]).relative_to(self.data)
            raise AbsentError(f"{choice.name}: no such file in {self.data.name}: {missing}") from error

    def _fetched(self, choice: TaskChoice, kind: Kind) -> list[Document]:
        if kind.hub is None:
            raise AbsentError(f"{choice.name}: the hub has no such data set; give a local copy with --data-dir")
        with _reachable(choice.name):
            return kind.hub()

    def _synthetic(self, choice: TaskChoice) -> list[Document]:
        count = (self._most(choice) or SYNTHETIC_EXAMPLES) + choice.shots
        length = choice.length or SYNTHETIC_TOKENS
        haystack = ruler.Haystack.of(self.tokenizer, self.text(), 20 * length)
        room = length - KINDS[choice.name].answer
        return ruler.examples(choice.name, self.tokenizer, haystack, length=room, count=count)

    def _ours(self, choice: TaskChoice, kind: Kind, documents: list[Document]) -> Task:
        chosen = bool(documents and documents[0]["choices"])
        scores = {
            "acc": ["acc"],
            "acc_norm": ["acc", "acc_norm"],
            "rouge": list(metrics.ROUGE),
            "f1": ["f1", "exact_match"],
            "found": ["found"],
        }
        config = {
            "output_type": "multiple_choice" if chosen else "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "gold" if chosen else "{{answers[0]}}",
            "doc_to_choice": "choices" if chosen else None,
            "process_results": None if chosen else partial(_scores, kind.metric),
            "generation_kwargs": None
            if chosen
            else {"until": list(kind.stop), "max_gen_toks": kind.answer, "do_sample": False},
            "metric_list": [
                {"metric": n, "aggregation": "mean", "higher_is_better": True} for n in scores[kind.metric]
            ],
        }
        return self._task(choice, kind, config, documents)

    def _task(self, choice: TaskChoice, kind: Kind, config: dict[str, Any], documents: list[Document]) -> Task:
        """Make a task of documents, of which the first are the examples."""
        examples = documents[: choice.shots]
        shown = {_text_of(document, -1 - number) for number, document in enumerate(examples)}
        asked = [document for document in documents[choice.shots :] if _text_of(document, 0) not in shown]
        asked = _spread(asked, choice.per_document)[: self._most(choice)]
        if not asked:
            raise AbsentError(
                f"{choice.name} has {len(documents)} rows, too few for {choice.shots} examples and a question"
            )
        parts = {"test": Dataset.from_list(asked)} | ({"train": Dataset.from_list(examples)} if examples else {})
        config = {name: value for name, value in config.items() if value is not None} | {
            "task": choice.name,
            "custom_dataset": lambda **_: DatasetDict(parts),
            "test_split": "test",
            "num_fewshot": choice.shots,
        }
        if examples:
            # The same examples before every question, so that they are read once.
            described = config.get("fewshot_config") or {}
            how = {name: value for name, value in described.items() if name not in ("samples", "split")}
            config |= {"fewshot_split": "train", "fewshot_config": how | {"sampler": "first_n"}}
        for name in ("tag", "group", "dataset_kwargs"):
            config.pop(name, None)
        names = [_text_of(document, number) for number, document in enumerate(asked)]
        too_long = choice.too_long or ("middle" if kind.long else "refuse")
        task = ConfigurableTask(config=config)
        # Written anew for every way of reading, many examples would take longer than the reading.
        task.fewshot_context = _remembering(task.fewshot_context)
        return Task(choice, task, kind.metric, too_long, names, [*examples, *asked])

    def _of_the_hub(self, choice: TaskChoice, kind: Kind | None) -> Task:
        """Let lm-evaluation-harness load a task and its data, of which the first rows are taken."""
        if self.data is not None:
            raise AbsentError(f"{choice.name}: no local copy of it can be read; leave --data-dir out to fetch it")
        with _reachable(choice.name):
            loaded = _manager().load([choice.name])["tasks"][choice.name]
        config = _config_of(choice.name)
        if kind is None:
            kind = Kind(_mean_of(choice.name, config), long=choice.name.startswith(LONGBENCH))
        asked = config.get("test_split") or config.get("validation_split")
        shown = config.get("fewshot_split") or config.get("training_split")
        # A task may leave rows out, or make others of them.
        process = loaded.config.process_docs or (lambda rows: rows)
        rows = process(loaded.dataset[asked])
        # Where examples come from what is asked, the first rows are examples and nothing else.
        apart = bool(choice.shots and shown and shown != asked)
        examples = _first(process(loaded.dataset[shown]), choice.shots) if apart else []
        most = self._most(choice)
        wanted = None if most is None else most + choice.shots
        config |= {**NO_DATA, "process_docs": None}
        return self._task(choice, kind, config, examples + _first(rows, wanted))


def _first(rows: Iterable[Document], most: int | None) -> list[Document]:
    return list(islice(rows, most))


def _remembering(write: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives what `write` gave before when it is called alike."""
    known: dict[str, Any] = {}

    def remembered(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, sorted(kwargs.items())))
        if key not in known:
            known[key] = write(*args, **kwargs)
        return known[key]

    return remembered


def _config_of(name: str) -> dict[str, Any]:
    """Return how lm-evaluation-harness describes a task of its own.

    Raises:
        AbsentError: If it is a program.
    """
    entry = _manager().task_index[name]
    config: dict[str, Any] = load_yaml(entry.yaml_path) if entry.yaml_path is not None else {}
    if not config.get("metric_list") or "class" in config:
        raise AbsentError(f"{name} is a program of lm-evaluation-harness; run it with `python -m lococo.eval.harness`")
    return config


def _mean_of(name: str, config: Mapping[str, Any]) -> str:
    """Return the first metric of a task that is a mean of its questions' scores."""
    for metric in config["metric_list"]:
        if metric.get("aggregation", "mean") == "mean" and metric["metric"] not in ("perplexity", "bypass"):
            return str(metric["metric"])
    raise AbsentError(f"{name} has no score that is a mean of questions; run it with `python -m lococo.eval.harness`")


def _text_of(document: Document, number: int) -> str:
    """Return a name of the text that a question is about, or of the question alone."""
    for field_name in ("document", "context", "article"):
        if isinstance(text := document.get(field_name), str):
            return text if field_name == "document" else copies.name_of(text)
    return str(number)


def _spread(documents: list[Document], most: int | None) -> list[Document]:
    """Return documents, of those with one text the first `most`."""
    seen: Counter[str] = Counter()
    taken = []
    for number, document in enumerate(documents):
        text = _text_of(document, number)
        seen[text] += 1
        if most is None or seen[text] <= most:
            taken.append(document)
    return taken


@lru_cache(maxsize=1)
def _manager() -> TaskManager:
    """Look through the files of all tasks of lm-evaluation-harness, which takes seconds."""
    return TaskManager()


def _scores(metric: str, document: Document, results: Sequence[str]) -> dict[str, float]:
    """Score what was written."""
    written, answers = results[0], document["answers"]
    if metric == metrics.GEOMETRIC_MEAN:
        return metrics.rouge(written, answers)
    if metric == "found":
        return {"found": metrics.found(written, answers)}
    return {"f1": metrics.f1(written, answers), "exact_match": metrics.exact_match(written, answers)}


@contextmanager
def _reachable(name: str) -> Iterator[None]:
    """Say at once that the hub cannot be reached; what is cached is found with HF_HUB_OFFLINE=1."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants, get_session

    remedy = "connect, or give a local copy with --data-dir"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        except Exception as error:  # of whichever library asks
            raise AbsentError(f"{name}: the hub cannot be reached ({type(error).__name__}); {remedy}") from error
    try:
        yield
    except ImportError as error:
        raise ArgumentError(
            f"{name} needs a package that is not here ({error}); install `lococo[longbench]`"
        ) from error
    except LococoError:
        raise
    except (OSError, ValueError, DatasetsError) as error:  # ValueError: another part of it is cached, this one not
        raise AbsentError(f"{name}: its data set cannot be fetched ({type(error).__name__}); {remedy}") from error
