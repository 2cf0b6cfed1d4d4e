"""SCROLLS (arXiv 2201.03533) from the hub: its validation parts, asked as lm-evaluation-harness asks them.

The files are read as they are; the code that the data set's repository holds for its metrics is not run.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lococo.errors import DocumentError
from lococo.eval.copies import Document, asked, of_contract, question_of

REPOSITORY = "tau/scrolls"
PART = "validation"


def qasper() -> list[Document]:
    """Fetch Qasper."""
    return [_asked(row) for row in _rows("qasper")]


def narrativeqa() -> list[Document]:
    """Fetch NarrativeQA with its whole stories."""
    return [_asked(row) for row in _rows("narrative_qa")]


def qmsum() -> list[Document]:
    """Fetch QMSum."""
    return [_asked(row) for row in _rows("qmsum")]


def gov_report() -> list[Document]:
    """Fetch GovReport."""
    return [_summed_up(row) for row in _rows("gov_report")]


def summ_screen() -> list[Document]:
    """Fetch SummScreenFD."""
    return [_summed_up(row) for row in _rows("summ_screen_fd")]


def contract_nli() -> list[Document]:
    """Fetch ContractNLI."""
    made = []
    for row in _rows("contract_nli"):
        hypothesis, text = _split(row)
        made.append(of_contract(text, hypothesis, row["outputs"][0]))
    return made


def quality() -> list[Document]:
    """Fetch QuALITY, whose choices stand between question and text."""
    made = []
    for row in _rows("quality"):
        question, rest = _split(row)
        listed, _, text = rest[rest.index("(D)") :].partition("\n\n")
        listed = rest[: rest.index("(D)")] + listed
        choices = [" ".join(choice.split()) for choice in re.split(r"\([A-D]\)", listed)[1:]]
        answer = " ".join(row["outputs"][0].split())
        made.append(asked(text.strip(), question, [answer], choices, choices.index(answer)))
    return made


def _asked(row: Document) -> Document:
    question, text = _split(row)
    return asked(text, question, row["outputs"])


def _summed_up(row: Document) -> Document:
    prompt = f"{row['input']}\n\nQuestion: What is a summary of the preceding text?\nAnswer:"
    return question_of(prompt, row["outputs"], document=row["input"])


def _split(row: Document) -> tuple[str, str]:
    """Return the question and what follows it."""
    question, _, text = row["input"].partition("\n\n")
    return question, text


def _rows(name: str) -> list[Document]:
    """Fetch the rows of a part, those of one question as one with several outputs."""
    from huggingface_hub import hf_hub_download

    file = Path(hf_hub_download(REPOSITORY, f"{name}.zip", repo_type="dataset"))
    found: dict[str, Document] = {}
    for row in _lines(file, f"{name}/{PART}.jsonl"):
        same = found.setdefault(row["id"], {**row, "outputs": []})
        same["outputs"].append(row["output"])
    return list(found.values())


def _lines(file: Path, member: str) -> Iterator[Document]:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as lines:
            for line in io.TextIOWrapper(lines, "utf-8"):
                row = json.loads(line)
                yield {**row, "id": row["id"], "input": row["input"], "output": row["output"]}
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise DocumentError(f"{file}: expected {member} with id, input and output in every line; {error!r}") from error
