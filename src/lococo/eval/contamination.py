"""Whether what is asked was trained on: runs of words that a benchmark and a folder of texts share."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from lococo.corpora import texts_in, texts_of
from lococo.eval.tasks import Task
from lococo.results import Results

# So many words in a row are no coincidence (GPT-3, arXiv 2005.14165).
RUN_OF_WORDS = 13

WORDS = re.compile(r"\w+")


def shared(texts: Mapping[str, str], corpus: Iterable[str]) -> dict[str, str]:
    """Return, of named texts, those that share a run of words with a corpus, and the first run of each.

    Args:
        texts: By name.
        corpus: Texts, each as a whole.
    """
    runs: dict[str, list[str]] = {}
    for name, text in texts.items():
        for run in _runs(text):
            runs.setdefault(run, []).append(name)
    hits: dict[str, str] = {}
    for text in corpus:
        for run in _runs(text):
            for name in runs.get(run, ()):
                hits.setdefault(name, run)
    return hits


def _runs(text: str) -> Iterator[str]:
    words = WORDS.findall(text.lower())
    return (" ".join(words[i : i + RUN_OF_WORDS]) for i in range(len(words) - RUN_OF_WORDS + 1))


def warn(tasks: Iterable[Task], folder: Path, results: Results, say: Callable[[str], None]) -> None:
    """Search a folder of texts for the questions of tasks and their examples, and note how many of each are found."""
    tasks = list(tasks)
    texts = {
        f"{place} {number}": " \n ".join(_strings(row))
        for place, task in enumerate(tasks)
        for number, row in enumerate(task.rows)
    }
    hits = shared(texts, ("".join(pieces) for file in texts_in(folder) for pieces in texts_of(file)))
    for place, task in enumerate(tasks):
        found = [hits[name] for number in range(len(task.rows)) if (name := f"{place} {number}") in hits]
        about = {"task": task.choice.name, "shots": task.choice.shots, "length": task.choice.length}
        searched = folder.resolve().name
        results.add({**about, "trained_on": searched, "rows": len(task.rows), "shared": len(found)})
        if found:
            say(
                f"warning: {len(found)} of {len(task.rows)} rows of {task.choice.name} share {RUN_OF_WORDS} words in a "
                f"row with {searched}, such as {found[0]!r}"
            )


def _strings(value: object) -> Iterator[str]:
    """Yield all texts within a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)
