"""Windows in which facts are hidden in real text and asked for at the end.

Ordinary text seldom refers back to one exact place, people who ask a model about a document always do. So what is worth
keeping although nobody attends to it yet has to be shown: statements of many forms, whose answers the full cache copies
from where they stand. The needle task of `lococo eval needle` states, asks and answers in another way, in other words.
"""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lococo.train.data import Corpus

# Facts per window of 2,048 tokens.
FACTS = 6

# Statement, question and the beginning of the answer; what is in braces is drawn from VALUES.
FORMS: tuple[tuple[str, str, str], ...] = (
    ("{person} was born in {year}.", "When was {person} born?", "{person} was born in {year}"),
    ("Call {person} at {number}.", "How do I reach {person}?", "Call {number}"),
    ("{person} works as a {job} in {city}.", "Where does {person} work?", "{person} works as a {job} in {city}"),
    ("In {year}, {city} had {number} inhabitants.", "How many inhabitants had {city}?", "{city} had {number}"),
    ("{person} signs in with {word}.", "What does {person} sign in with?", "With {word}"),
    ("{person} paid {number} dollars for {thing}.", "What did {person} pay for {thing}?", "{person} paid {number}"),
    ("{thing} = {number}", "{thing}?", "{thing} = {number}"),
    ('"{thing}": {word},', "What is the value of {thing}?", '"{thing}": {word}'),
    ("Note: {thing} belongs to {person}.", "Who owns {thing}?", "{thing} belongs to {person}"),
    ("The train to {city} leaves from platform {small}.", "Where does the train to {city} leave?", "Platform {small}"),
    ("The meeting with {person} is on {day} at {small}.", "When is the meeting with {person}?", "On {day} at {small}"),
    ("{person} keeps {thing} in {city}.", "Where does {person} keep {thing}?", "{person} keeps {thing} in {city}"),
    ("{city} has long been the capital of {word}.", "Which city governs {word}?", "{word} is governed from {city}"),
    ("Order {number} was sent to {person}.", "Who got order {number}?", "Order {number} was sent to {person}"),
    ("The key of {person} fits room {small}.", "Which room does {person} have?", "Room {small}"),
    (
        "Version {small}.{digit} of {thing} came out in {year}.",
        "When did {thing} come out?",
        "{thing} came out in {year}",
    ),
    ("I like {word} best of all {kind}s.", "Which {kind} do I like best?", "You like {word}"),
)

# How a question and the beginning of its answer follow the text.
FRAMES = ("\n\n{question}\n{lead}", "\n\n- {question} - {lead}", " And {question} {lead}", "\n\n> {question}\n\n{lead}")

CHOICES = {
    "syllable": "ba|ce|di|fo|gu|ha|je|ki|lo|mu|na|pe|qui|ro|su|ta|ve|wi|xo|yu|za|bri|cla|dre|flo|gri|pla|sto|tru",
    "person": "Anna|Boris|Clara|David|Elena|Felix|Greta|Hugo|Irene|Jonas|Karin|Leon|Marta|Nils|Olga|Paul",
    "thing": "the printer|the blue box|the garden shed|the old lamp|the silver ring|the red car|the cellar door|"
    "the third drawer|the camera|the north window|the black notebook|the boat|the piano|the alarm",
    "job": "baker|teacher|pilot|lawyer|painter|nurse|plumber|editor",
    "city": "Lisbon|Oslo|Kyoto|Lima|Dublin|Cairo|Quito|Riga|Hanoi|Turin|Bergen|Graz|Porto|Tartu",
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "kind": "colour|animal|dish|song|game|flower",
}
VALUES = {name: tuple(text.split("|")) for name, text in CHOICES.items()}


@dataclass(frozen=True)
class Recall:
    """A window that ends with questions.

    Attributes:
        ids: Text with facts in it, then questions and answers.
        asked: Places whose predictions are the answers' tokens, ascending.
    """

    ids: list[int]
    asked: list[int]


def recall_window(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seed: int, number: int, *, length: int, least: int
) -> Recall:
    """Draw a window of a corpus and hide facts in it; arguments as for `Corpus.window`."""
    draw = random.Random(f"recall/{seed}/{number}")
    count = min(max(1, FACTS * length // 2048), len(FORMS))
    facts = [_fact(form, draw) for form in draw.sample(FORMS, count)]
    statements = [_ids(tokenizer, f" {statement} ") for statement, _, _ in facts]
    draw.shuffle(order := list(range(count)))
    questions: list[tuple[list[int], list[int]]] = []
    for fact in order:
        _, question, answer = facts[fact]
        lead, value = answer
        asking = draw.choice(FRAMES).format(question=question, lead=lead)
        questions.append((_ids(tokenizer, asking), _ids(tokenizer, value)))
    rest = length - sum(map(len, statements)) - sum(len(a) + len(b) for a, b in questions)
    text = corpus.window(seed, number, length=max(1, rest), least=min(least, max(1, rest)))
    places = sorted(draw.randrange(len(text)) for _ in range(count))
    ids: list[int] = []
    for start, stop, statement in zip([0, *places], [*places, len(text)], [*statements, []], strict=True):
        ids += text[start:stop] + statement
    asked: list[int] = []
    for asked_for, told in questions:
        ids += asked_for + told
        asked += range(len(ids) - len(told) - 1, len(ids) - 1)
    return Recall(ids, asked)


def _fact(form: tuple[str, str, str], draw: random.Random) -> tuple[str, str, tuple[str, str]]:
    """Fill in a statement, its question, and its answer split into what is given and what is to be recalled."""
    statement, question, answer = form
    values = {name: draw.choice(choices) for name, choices in VALUES.items()}
    values["number"] = str(draw.randrange(100, 10 ** draw.randint(3, 6)))
    values["year"] = str(draw.randrange(1500, 2030))
    values["small"] = str(draw.randrange(1, 100))
    values["digit"] = str(draw.randrange(10))
    values["word"] = "".join(draw.choice(VALUES["syllable"]) for _ in range(draw.randint(2, 3)))
    lead, _, last = answer.rpartition("{")
    return (
        statement.format(**values),
        question.format(**values),
        (lead.format(**values).rstrip(), " " + ("{" + last).format(**values)),
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
