"""Local copies of benchmarks: folders of JSON lines, read into the documents that tasks ask about.

A document of lm-evaluation-harness is a dict. Tasks of its own get the fields that they have on the hub; ours get
`question_of`. Every reader takes a folder, checks every line, and keeps the order of the file.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lococo.errors import DocumentError

Document = dict[str, Any]

KINDS = {str: "text", int: "a whole number", list: "a list"}


def question_of(
    prompt: str, answers: Sequence[str], *, document: object, choices: Sequence[str] = (), gold: int = 0
) -> Document:
    """Return a document of ours.

    Args:
        prompt: All that is read before the answer.
        answers: Right ones.
        document: Names the text that the question is about; questions about one text are not independent.
        choices: Answers to choose from; none: the model writes.
        gold: Which of them is right.
    """
    return {
        "prompt": prompt,
        "answers": list(answers),
        "choices": list(choices),
        "gold": gold,
        "document": str(document),
    }


def hellaswag(folder: Path) -> list[Document]:
    """Read HellaSwag."""
    fields = {"ctx_a": str, "ctx_b": str, "activity_label": str, "endings": list, "label": (int, str)}

    def convert(row: Document) -> Document:
        _in_range(int(row["label"]), row["endings"])
        return {name: row[name] for name in fields} | {"label": str(row["label"])}

    return _read(folder, fields, convert)


def winogrande(folder: Path) -> list[Document]:
    """Read WinoGrande."""
    fields = {"sentence": str, "option1": str, "option2": str, "answer": str}

    def convert(row: Document) -> Document:
        _place(row["answer"], ["1", "2"])
        return {name: row[name] for name in fields}

    return _read(folder, fields, convert)


def arc(folder: Path) -> list[Document]:
    """Read ARC."""

    def convert(row: Document) -> Document:
        labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
        answer = labels[_in_range(row["gold"], labels)]
        return {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": labels},
            "answerKey": answer,
        }

    return _read(folder, {"question": str, "choices": list, "gold": int}, convert)


def triviaqa(folder: Path) -> list[Document]:
    """Read TriviaQA without evidence."""

    def convert(row: Document) -> Document:
        return {"question": row["question"], "answer": {"value": row["answer"], "aliases": row["aliases"]}}

    return _read(folder, {"question": str, "answer": str, "aliases": list}, convert)


def as_on_the_hub(folder: Path) -> list[Document]:
    """Read a copy that has the fields of the hub's data set."""
    return _read(folder, {}, dict)


def squad(folder: Path) -> list[Document]:
    """Read SQuAD, or NarrativeQA's questions about summaries."""

    def convert(text: str, row: Document) -> Document:
        return _asked(text, row["question"], row["answers"], row["doc_id"])

    return _read_questions(folder, {"question": str, "answers": list}, convert)


def hotpotqa(folder: Path) -> list[Document]:
    """Read HotpotQA with its distractors, laid out as in LongBench (arXiv 2308.14508)."""

    def convert(row: Document) -> Document:
        passages = (f"Passage {i}:\n{p['title']}\n{p['text']}\n" for i, p in enumerate(row["paragraphs"], 1))
        return _asked("".join(passages), row["question"], [row["answer"]], row["question"])

    return _read(folder, {"question": str, "answer": str, "paragraphs": list}, convert)


def qmsum(folder: Path) -> list[Document]:
    """Read QMSum."""

    def convert(text: str, row: Document) -> Document:
        return _asked(text, row["question"], [row["answer"]], row["doc_id"])

    return _read_questions(folder, {"question": str, "answer": str}, convert)


def qasper_yesno(folder: Path) -> list[Document]:
    """Read Qasper's questions that are answered with yes or no."""

    def convert(text: str, row: Document) -> Document:
        return _asked(text, row["question"], [row["answer"]], row["doc_id"], ["Yes", "No"])

    return _read_questions(folder, {"question": str, "answer": str}, convert)


def contract_nli(folder: Path) -> list[Document]:
    """Read ContractNLI."""

    def convert(text: str, row: Document) -> Document:
        answer = "Not mentioned" if row["answer"] == "NotMentioned" else row["answer"]
        return of_contract(text, row["hypothesis"], answer, row["doc_id"])

    return _read_questions(folder, {"hypothesis": str, "answer": str}, convert)


def of_contract(text: str, hypothesis: str, answer: str, document: object) -> Document:
    """Return the question whether a contract entails a hypothesis."""
    choices = ["Not mentioned", "Entailment", "Contradiction"]
    prompt = f"{text}\n\nHypothesis: {hypothesis}\nConclusion:"
    return question_of(prompt, [answer], document=document, choices=choices, gold=_place(answer, choices))


def babi(folder: Path, number: int) -> list[Document]:
    """Read one of bAbI's tasks; the answers of all its questions are those to choose from."""
    files = sorted(folder.glob(f"qa{number}_*.txt"))
    if not files:
        raise FileNotFoundError(folder / f"qa{number}_*.txt")
    asked = [(story, *question) for file in files for story, question in _stories(file)]
    answers = sorted({answer for _, _, answer in asked})
    made: list[Document] = []
    for story, question, answer in asked:
        prompt = "\n".join([*story, f"Question: {question}", "Answer:"])
        place = answers.index(answer)
        made.append(question_of(prompt, [answer], document=len(made), choices=answers, gold=place))
    return made


def _stories(file: Path) -> Iterator[tuple[list[str], tuple[str, str]]]:
    """Yield, per question, the sentences before it, and the question with its answer."""
    story: list[str] = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        parsed = re.fullmatch(r"(\d+) ([^\t]*)(?:\t([^\t]+)\t[\d ]*)?", line)
        if parsed is None:
            raise DocumentError(
                f"{file}, line {number}: expected 'N sentence' or 'N question<tab>answer<tab>lines', got {line!r}"
            )
        if parsed[1] == "1":
            story = []
        if parsed[3] is None:
            story.append(parsed[2])
        else:
            yield list(story), (parsed[2].strip(), parsed[3])


def _asked(text: str, question: str, answers: Sequence[str], document: object, choices: Sequence[str] = ()) -> Document:
    """Return a question that follows its text, as lm-evaluation-harness asks SCROLLS' questions."""
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"expected answers in text, got {answers!r}")
    gold = _place(answers[0], choices) if choices else 0
    prompt = f"{text}\n\nQuestion: {question}\nAnswer:"
    return question_of(prompt, answers, document=document, choices=choices, gold=gold)


def _place(answer: str, choices: Sequence[str]) -> int:
    if answer not in choices:
        raise ValueError(f"expected an answer out of {', '.join(choices)}, got {answer!r}")
    return choices.index(answer)


def _in_range(number: int, choices: Sequence[object]) -> int:
    if not 0 <= number < len(choices):
        raise ValueError(f"expected the number of one of {len(choices)} choices, from 0, got {number}")
    return number


def _read(folder: Path, fields: Mapping[str, Any], convert: Callable[[Document], Document]) -> list[Document]:
    """Convert every row of the .jsonl files of a folder."""
    return [document for file in _files(folder) for document in _converted(file, fields, convert)]


def _read_questions(
    folder: Path, fields: Mapping[str, Any], convert: Callable[[str, Document], Document]
) -> list[Document]:
    """Convert questions with their texts, of pairs of files such as val_docs.jsonl and val_questions.jsonl."""
    made: list[Document] = []
    if not (files := [file for file in _files(folder) if "questions" in file.name]):
        raise FileNotFoundError(folder / "*questions*.jsonl")
    for file in files:
        beginning = file.name.partition("questions")[0] + "docs"
        texts: dict[Any, str] = {}
        if not (docs := [other for other in _files(folder) if other.name.startswith(beginning)]):
            raise FileNotFoundError(folder / f"{beginning}*.jsonl")
        for row in _converted(docs[0], {"doc_id": (int, str), "text": str}, dict):
            texts[row["doc_id"]] = row["text"]

        def of_text(row: Document, texts: dict[Any, str] = texts, docs: Path = docs[0]) -> Document:
            if row["doc_id"] not in texts:
                raise ValueError(f"expected the doc_id of a text in {docs.name}, got {row['doc_id']!r}")
            return convert(texts[row["doc_id"]], row)

        made += _converted(file, {"doc_id": (int, str), **fields}, of_text)
    return made


def _files(folder: Path) -> list[Path]:
    """Return the .jsonl files of a folder.

    Raises:
        FileNotFoundError: If there are none.
    """
    if found := sorted(folder.glob("*.jsonl")):
        return found
    raise FileNotFoundError(folder / "*.jsonl")


def _converted(file: Path, fields: Mapping[str, Any], convert: Callable[[Document], Document]) -> Iterator[Document]:
    """Yield what is made of the objects of a file of JSON lines."""
    wanted = ", ".join(f"{name} ({_said(kind)})" for name, kind in fields.items()) or "any fields"
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DocumentError(f"{file}, line {number}: expected a JSON object with {wanted}; {error}") from error
            if not isinstance(row, dict):
                raise DocumentError(f"{file}, line {number}: expected a JSON object with {wanted}, got {row!r:.80}")
            for name, kind in fields.items():
                if not isinstance(row.get(name), kind):
                    raise DocumentError(
                        f"{file}, line {number}: expected {name} to be {_said(kind)}, got {row.get(name)!r:.80}"
                    )
            try:
                yield convert(row)
            except (ValueError, KeyError, TypeError) as error:
                raise DocumentError(f"{file}, line {number}: {error}") from error


def _said(kind: Any) -> str:
    return " or ".join(KINDS[each] for each in (kind if isinstance(kind, tuple) else (kind,)))
