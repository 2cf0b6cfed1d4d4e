"""Local copies of benchmarks: folders of JSON lines, read into the documents that tasks ask about.

A document of lm-evaluation-harness is a dict. Tasks of its own get the fields that they have on the hub; ours get
`question_of`. Every reader takes a folder, checks every line, and keeps the order of the file.
"""

import hashlib
import json
import re
from ast import literal_eval
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
        document: The text that the question is about, or its name; questions about one text are not independent.
        choices: Answers to choose from; none: the model writes.
        gold: Which of them is right.
    """
    return {
        "prompt": prompt,
        "answers": list(answers),
        "choices": list(choices),
        "gold": gold,
        "document": name_of(document),
    }


def name_of(text: object) -> str:
    """Return a short name for a text."""
    return hashlib.sha256(str(text).encode("utf-8", "replace")).hexdigest()[:12]


def hellaswag(folder: Path) -> list[Document]:
    """Read HellaSwag."""
    fields = {"ctx_a": str, "ctx_b": str, "activity_label": str, "endings": list, "label": (int, str)}

    def convert(row: Document) -> Document:
        if not str(row["label"]).isdigit():
            raise ValueError(f"expected label to be the number of an ending, from 0, got {row['label']!r}")
        _in_range(int(row["label"]), _texts(row["endings"]))
        return {name: row[name] for name in fields} | {"label": str(row["label"])}

    return _read(folder, fields, convert)


def winogrande(folder: Path) -> list[Document]:
    """Read WinoGrande."""
    fields = {"sentence": str, "option1": str, "option2": str, "answer": str}

    def convert(row: Document) -> Document:
        _place(row["answer"], ["1", "2"])
        _texts([row["option1"], row["option2"]])
        if row["sentence"].count("_") != 1:
            raise ValueError(f"expected a sentence with one _, got {row['sentence']!r}")
        return {name: row[name] for name in fields}

    return _read(folder, fields, convert)


def arc(folder: Path) -> list[Document]:
    """Read ARC."""

    def convert(row: Document) -> Document:
        labels = [chr(ord("A") + i) for i in range(len(_texts(row["choices"])))]
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
        others = [alias for alias in row["aliases"] if not isinstance(alias, str) or alias.strip()]
        aliases = list(dict.fromkeys(_texts([row["answer"], *others])))
        return {"question": row["question"], "answer": {"value": row["answer"], "aliases": aliases}}

    return _read(folder, {"question": str, "answer": str, "aliases": list}, convert)


def race(folder: Path) -> list[Document]:
    """Read RACE with the fields of the hub's copy: an article, and its problems as text."""

    def convert(row: Document) -> Document:
        try:
            problems = [(each["question"], each["options"], each["answer"]) for each in literal_eval(row["problems"])]
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
            raise ValueError(
                "expected problems to spell a list of objects with question, options and answer, got "
                f"{row['problems']!r:.80}"
            ) from error
        if not problems:
            raise ValueError("expected one problem or more, got none")
        for question, options, answer in problems:
            _texts([question])
            if not isinstance(options, list) or len(_texts(options)) != 4:
                raise ValueError(f"expected four options, got {options!r:.80}")
            _place(answer, ["A", "B", "C", "D"])
        return row

    return _read(folder, {"article": str, "problems": str}, convert)


def logiqa2(folder: Path) -> list[Document]:
    """Read LogiQA 2.0 with the fields of the hub's copy."""

    def convert(row: Document) -> Document:
        _in_range(row["answer"], _texts(row["options"]))
        return row

    return _read(folder, {"text": str, "question": str, "options": list, "answer": int}, convert)


def squad(folder: Path) -> list[Document]:
    """Read SQuAD, or NarrativeQA's questions about summaries."""

    def convert(text: str, row: Document) -> Document:
        return _asked(text, row["question"], row["answers"])

    return _read_questions(folder, {"question": str, "answers": list}, convert)


def hotpotqa(folder: Path) -> list[Document]:
    """Read HotpotQA with its distractors, laid out as in LongBench (arXiv 2308.14508)."""

    def convert(row: Document) -> Document:
        for each in row["paragraphs"]:
            if not isinstance(each, dict) or not all(isinstance(each.get(name), str) for name in ("title", "text")):
                raise ValueError(f"expected paragraphs to be objects with 'title' and 'text', got {each!r:.80}")
        passages = (f"Passage {i}:\n{p['title']}\n{p['text']}\n" for i, p in enumerate(row["paragraphs"], 1))
        return _asked("".join(passages), row["question"], [row["answer"]])

    return _read(folder, {"question": str, "answer": str, "paragraphs": list}, convert)


def qmsum(folder: Path) -> list[Document]:
    """Read QMSum."""

    def convert(text: str, row: Document) -> Document:
        return _asked(text, row["question"], [row["answer"]])

    return _read_questions(folder, {"question": str, "answer": str}, convert)


def qasper_yesno(folder: Path) -> list[Document]:
    """Read Qasper's questions that are answered with yes or no."""

    def convert(text: str, row: Document) -> Document:
        return _asked(text, row["question"], [row["answer"]], ["Yes", "No"])

    return _read_questions(folder, {"question": str, "answer": str}, convert)


def contract_nli(folder: Path) -> list[Document]:
    """Read ContractNLI."""

    def convert(text: str, row: Document) -> Document:
        answer = "Not mentioned" if row["answer"] == "NotMentioned" else row["answer"]
        return of_contract(text, row["hypothesis"], answer)

    return _read_questions(folder, {"hypothesis": str, "answer": str}, convert)


def of_contract(text: str, hypothesis: str, answer: str) -> Document:
    """Return the question whether a contract entails a hypothesis."""
    choices = ["Not mentioned", "Entailment", "Contradiction"]
    prompt = f"{text}\n\nHypothesis: {hypothesis}\nConclusion:"
    return question_of(prompt, [answer], document=text, choices=choices, gold=_place(answer, choices))


def babi(folder: Path, number: int) -> list[Document]:
    """Read one of bAbI's tasks; the answers of all its questions are those to choose from."""
    files = sorted(folder.glob(f"qa{number}_*.txt"))
    if not files:
        raise FileNotFoundError(folder / f"qa{number}_*.txt")
    asked = [(file.name, *each) for file in files for each in _stories(file)]
    answers = sorted({each[-1] for each in asked})
    made: list[Document] = []
    for name, story, said, question, answer in asked:
        prompt = "\n".join([*said, f"Question: {question}", "Answer:"])
        place = answers.index(answer)
        made.append(question_of(prompt, [answer], document=(name, story), choices=answers, gold=place))
    return made


def _stories(file: Path) -> Iterator[tuple[int, list[str], str, str]]:
    """Yield, per question, the number of its story, the sentences before it, the question and its answer."""
    story = 0
    said: list[str] = []
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DocumentError(f"{file} is not UTF-8 (byte {error.start}); convert it with iconv") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parsed = re.fullmatch(r"(\d+) ([^\t]*)(?:\t([^\t]+)\t[\d ]*)?", line)
        if parsed is None:
            raise DocumentError(
                f"{file}, line {number}: expected 'N sentence' or 'N question<tab>answer<tab>lines', got {line!r}"
            )
        if parsed[1] == "1":
            story, said = story + 1, []
        if parsed[3] is None:
            said.append(parsed[2])
        else:
            yield story, list(said), parsed[2].strip(), parsed[3]


def _asked(text: str, question: str, answers: Sequence[str], choices: Sequence[str] = ()) -> Document:
    gold = _place(_texts(answers)[0], choices) if choices else 0
    return asked(text, question, _texts(answers), choices, gold)


def asked(text: str, question: str, answers: Sequence[str], choices: Sequence[str] = (), gold: int = 0) -> Document:
    """Return a question that follows its text, as lm-evaluation-harness asks SCROLLS' questions."""
    prompt = f"{text}\n\nQuestion: {question}\nAnswer:"
    return question_of(prompt, answers, document=text, choices=choices, gold=gold)


def _texts(values: Sequence[object]) -> list[str]:
    """Refuse choices or answers that are none."""
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"expected one or more texts that are not empty, got {values!r:.80}")
    return [str(value) for value in values]


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
                row = _clean(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DocumentError(f"{file}, line {number}: expected a JSON object with {wanted}; {error}") from error
            if not isinstance(row, dict):
                raise DocumentError(f"{file}, line {number}: expected a JSON object with {wanted}, got {row!r:.80}")
            for name, kind in fields.items():
                if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
                    raise DocumentError(
                        f"{file}, line {number}: expected {name} to be {_said(kind)}, got {row.get(name)!r:.80}"
                    )
            try:
                yield convert(row)
            except (ValueError, KeyError, TypeError) as error:
                raise DocumentError(f"{file}, line {number}: {error}") from error


def _clean(value: Any) -> Any:
    """Replace halves of surrogate pairs, which JSON can spell and no tokenizer takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(each) for each in value]
    return {key: _clean(each) for key, each in value.items()} if isinstance(value, dict) else value


def _said(kind: Any) -> str:
    return " or ".join(KINDS[each] for each in (kind if isinstance(kind, tuple) else (kind,)))
