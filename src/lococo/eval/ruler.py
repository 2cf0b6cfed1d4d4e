"""The synthetic families of RULER (arXiv 2404.06654), made of any text.

Numbers hidden in it (one key, several keys, several values of a key, several keys asked for), variables that take
their value from one another, and the commonest words of a list. Every example is a prompt of at most a given number of
tokens, with the answers that must occur in what the model writes after it.
"""

import bisect
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from lococo.errors import ArgumentError, DocumentError
from lococo.eval.copies import Document, question_of

KEYS = 4
VALUES = 4
DIGITS = 7
VARIABLES = 5
COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
FREQUENT, ZETA = 3, 2.0

# Longer sentences are cut, so that what remains of the room for text is shorter than this.
MOST_PER_SENTENCE = 48

# Words that keys and lists are made of.
WORD = re.compile(r"\b[a-z]{4,9}\b")


@dataclass(frozen=True)
class Haystack:
    """Text to hide things in.

    Attributes:
        sentences: In their order.
        lengths: Tokens of each.
        words: Different ones, in the order in which they first occur.
    """

    sentences: list[str]
    lengths: list[int]
    words: list[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: Iterable[str], tokens: int) -> "Haystack":
        """Take the first sentences of a text, some `tokens` of them.

        Raises:
            DocumentError: If the text has no words to make keys of.
        """
        sentences: list[str] = []
        lengths: list[int] = []
        for piece in text:
            whole = [s for s in (" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", piece)) if s]
            more = [
                part
                for sentence, tokens_there in zip(whole, _lengths(tokenizer, whole), strict=True)
                for part in _parts(sentence, -(-tokens_there // MOST_PER_SENTENCE))
            ]
            sentences += more
            lengths += _lengths(tokenizer, more)
            if sum(lengths) >= tokens:
                break
        words = list(dict.fromkeys(word for sentence in sentences for word in WORD.findall(sentence)))
        if len(words) < 2 * KEYS:
            raise DocumentError(f"expected a text with at least {2 * KEYS} different words, got {len(words)}")
        return cls(sentences, lengths, words)


def _lengths(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def _parts(sentence: str, count: int) -> list[str]:
    """Cut a sentence between words into `count` parts, or as many as it has words."""
    words = sentence.split()
    size = -(-len(words) // count)
    return [" ".join(words[start : start + size]) for start in range(0, len(words), size)]


def examples(
    family: str, tokenizer: PreTrainedTokenizerBase, haystack: Haystack, *, length: int, count: int, seed: int = 0
) -> list[Document]:
    """Make examples of a family, the same ones for the same seed.

    Args:
        family: A name of FAMILIES.
        tokenizer: Of the model.
        haystack: Where the text comes from.
        length: Most tokens of a prompt.
        count: How many.
        seed: Of keys, values and places.

    Raises:
        ArgumentError: If so many tokens leave no room for what is to be found.
    """
    make = FAMILIES[family]
    made = []
    for number in range(count):
        draw = random.Random(f"{seed}/{family}/{length}/{number}")
        prompt, answers = make(draw, haystack, partial(_tokens, tokenizer), length)
        made.append(question_of(prompt, answers, document=number))
    return made


Count = Callable[[str], int]
Example = tuple[str, list[str]]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def _numbers(
    keys: int, values: int, asked: int, draw: random.Random, hay: Haystack, count: Count, length: int
) -> Example:
    """Hide `values` numbers of each of `keys` keys, and ask for all of those of `asked` keys."""
    names = [f"{one}-{other}" for one, other in zip(*[iter(draw.sample(hay.words, 2 * keys))] * 2, strict=True)]
    held = {name: [str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for _ in range(values)] for name in names}
    needles = [f"One of the magic numbers of {name} is {value}." for name in names for value in held[name]]
    draw.shuffle(needles)
    wanted = ", ".join(names[:asked])
    before = "Magic numbers are hidden in the following text. Keep them in mind: you will be asked for them.\n"
    after = f"\nQuestion: What are all the magic numbers of {wanted} in the text above?\n"
    after += f"Answer: The magic numbers of {wanted} in the text above are"
    prompt = before + _hidden(needles, draw, hay, count, length - count(before + after)) + after
    return prompt, [value for name in names[:asked] for value in held[name]]


def _variables(draw: random.Random, hay: Haystack, count: Count, length: int) -> Example:
    """Hide a number, and variables that take it from one another."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = list(dict.fromkeys("".join(draw.choices(letters, k=5)) for _ in range(2 * VARIABLES)))[:VARIABLES]
    value = str(draw.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}."]
    chain += [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
    before = "Assignments of variables are hidden in the following text. Keep track of them.\n"
    after = f"\nQuestion: Which variables have the value {value} in the text above?\n"
    after += f"Answer: The {VARIABLES} variables that have the value {value} are VAR"
    return before + _hidden(chain, draw, hay, count, length - count(before + after)) + after, names


def _hidden(needles: list[str], draw: random.Random, hay: Haystack, count: Count, room: int) -> str:
    """Return as much text as there is room for, with needles between its sentences, in their order."""
    room -= sum(count(needle) + 1 for needle in needles)
    first = at = draw.randrange(len(hay.sentences))
    taken: list[str] = []
    while True:
        # A sentence needs a token more than alone, for the space before it.
        room -= hay.lengths[at] + 1
        if room < 0:
            break
        taken.append(hay.sentences[at])
        at = (at + 1) % len(hay.sentences)
        if at == first:
            raise DocumentError(f"expected a text of {room} tokens more to hide things in; give a longer one")
    if not taken:
        raise ArgumentError(f"a prompt needs {-room} tokens more to hide {len(needles)} sentences; raise the length")
    places = sorted(draw.choices(range(len(taken) + 1), k=len(needles)))
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        taken.insert(place, needle)
    return " ".join(taken)


def _common_words(draw: random.Random, hay: Haystack, count: Count, length: int) -> Example:
    """List words of which some occur ten times as often as others."""
    before = "Below is a numbered list of words, some of which occur more often than others. Keep those in mind.\n"
    after = f"\nQuestion: What are the {COMMON} most common words of the list above?\n"
    after += f"Answer: The {COMMON} most common words of the list are:"
    if len(hay.words) <= COMMON:
        raise DocumentError(f"expected a text with more than {COMMON} different words, got {len(hay.words)}")
    pool = draw.sample(hay.words, len(hay.words))
    common, rare = pool[:COMMON], pool[COMMON:]
    # Short lists keep the proportion of ten to one as long as they can.
    for times in range(COMMON_TIMES, RARE_TIMES, -RARE_TIMES):
        listed = [word for word in common for _ in range(times)]
        if count(before + _numbered(listed) + after) <= length:
            break
    else:
        raise ArgumentError(f"a list of common words needs more than {length} tokens; raise the length")
    filler = [word for word in rare for _ in range(max(1, times // 10))]

    def fits(number: int) -> bool:
        return count(before + _numbered(listed + filler[:number]) + after) <= length

    listed += filler[: bisect.bisect_left(range(len(filler) + 1), True, key=lambda number: not fits(number)) - 1]
    draw.shuffle(listed)
    return before + _numbered(listed) + after, common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _frequent_words(draw: random.Random, hay: Haystack, count: Count, length: int) -> Example:
    """Write made-up words, the n-th in proportion to n to the power of -ZETA."""
    before = "In the following coded text some words occur more often than others. Keep track of how often.\n"
    after = f"\nQuestion: What are the {FREQUENT} most frequent words of the coded text above?\n"
    after += f"Answer: The {FREQUENT} most frequent words of the coded text are:"
    coded = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200)]
    weights = [(n + 1) ** -ZETA for n in range(len(coded))]
    room = length - count(before + after)
    per_word = max(1, count(" ".join(coded)) / len(coded))
    number = int(room / per_word)
    shares = [max(1, round(number * weight / sum(weights))) for weight in weights]
    words = [word for word, times in zip(coded, shares, strict=True) for _ in range(times)][:number]
    while words and count(before + " ".join(words) + after) > length:
        words = words[: int(len(words) * 0.97)]
    times = Counter(words)
    # The last word that is asked for must occur more often than the next one.
    if times[coded[FREQUENT - 1]] <= times[coded[FREQUENT]] or not times[coded[FREQUENT]]:
        raise ArgumentError(f"a coded text needs more than {length} tokens; raise the length")
    draw.shuffle(words)
    return before + " ".join(words) + after, coded[:FREQUENT]


FAMILIES: dict[str, Callable[[random.Random, Haystack, Count, int], Example]] = {
    "ruler_niah_single": partial(_numbers, 1, 1, 1),
    "ruler_niah_multikey": partial(_numbers, KEYS, 1, 1),
    "ruler_niah_multivalue": partial(_numbers, 1, VALUES, 1),
    "ruler_niah_multiquery": partial(_numbers, KEYS, 1, KEYS),
    "ruler_vt": _variables,
    "ruler_cwe": _common_words,
    "ruler_fwe": _frequent_words,
}

# Tokens that an answer takes: numbers come at once after the prompt's last word.
ANSWER_TOKENS = {
    "ruler_niah_single": 32,
    "ruler_niah_multikey": 32,
    "ruler_niah_multivalue": 64,
    "ruler_niah_multiquery": 64,
    "ruler_vt": 32,
    "ruler_cwe": 128,
    "ruler_fwe": 64,
}
