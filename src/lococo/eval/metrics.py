"""Scores of single answers, and the score of many."""

import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

# Raised with every change of what a score means, so that what was measured with it is measured again.
REVISION = 2

ROUGE = ("rouge1", "rouge2", "rougeL")

# Not the mean of a score per answer, but made of the means of several.
GEOMETRIC_MEAN = "rouge"

RESAMPLES = 2000

# Of fewer, resampling says less than it seems to: with two, the interval is from the one to the other.
FEWEST_DOCUMENTS = 6


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of the words that a prediction shares with the answer nearest to it (SQuAD, arXiv 1606.05250)."""
    return max(_shared(_normalized(prediction).split(), _normalized(answer).split()) for answer in answers)


def _shared(words: list[str], others: list[str]) -> float:
    if not words or not others:
        return float(words == others)
    same = (Counter(words) & Counter(others)).total()
    return 2 * same / (len(words) + len(others))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if a prediction is one of the answers but for case, punctuation and articles (SQuAD), else 0."""
    return float(_normalized(prediction) in map(_normalized, answers))


def _normalized(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, with single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def rouge(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L (F measures without stemming), each of the answer that gives most, as SCROLLS does."""
    scores = [_scorer().score(answer, prediction) for answer in answers]
    return {name: max(float(score[name].fmeasure) for score in scores) for name in ROUGE}


def found(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of answers that occur in a prediction whatever their case, as RULER counts them."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def overall(metric: str, scores: Mapping[str, Sequence[float]], which: Sequence[int] | None = None) -> float:
    """Return the score of a set of answers.

    Args:
        metric: A name in `scores`, whose mean is taken, or "rouge", the geometric mean of the means of ROUGE-1, -2
            and -L (SCROLLS, arXiv 2201.03533).
        scores: Per name a score for every answer.
        which: Answers that count, some perhaps more than once; None: all.
    """
    names = ROUGE if metric == GEOMETRIC_MEAN else (metric,)
    columns = [scores[name] if which is None else [scores[name][i] for i in which] for name in names]
    means = [math.fsum(column) / len(column) for column in columns]
    return math.prod(means) ** (1 / len(means))


def interval(
    documents: Sequence[str], figure: Callable[[Sequence[int]], float], *, seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % bootstrap interval of a figure of some questions, resampling documents with all about them.

    Nothing is said of fewer than FEWEST_DOCUMENTS.

    Args:
        documents: The text that each question is about.
        figure: Of questions, some perhaps more than once.
        seed: Of the resampling.
    """
    of: dict[str, list[int]] = {}
    for number, document in enumerate(documents):
        of.setdefault(document, []).append(number)
    groups = list(of.values())
    if len(groups) < FEWEST_DOCUMENTS:
        return None, None
    rng = random.Random(seed)
    drawn = (rng.choices(groups, k=len(groups)) for _ in range(RESAMPLES))
    figures = sorted(figure([number for group in some for number in group]) for some in drawn)
    return figures[int(0.025 * RESAMPLES)], figures[int(0.975 * RESAMPLES) - 1]


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=False)
