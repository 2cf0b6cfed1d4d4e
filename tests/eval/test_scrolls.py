import json
import zipfile

import pytest

from lococo.errors import DocumentError
from lococo.eval import scrolls

STORY = "Once there was a fox.\n\nIt jumped."


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Put archives with made-up rows in the place of the hub's."""

    def put(name, rows):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}/validation.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def download(repository, file, *, repo_type):
        assert (repository, repo_type) == ("tau/scrolls", "dataset")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return put


def row(identifier, text, output):
    return {"id": identifier, "pid": f"{identifier}_0", "input": text, "output": output}


@pytest.mark.parametrize(
    ("name", "read"), [("qasper", scrolls.qasper), ("narrative_qa", scrolls.narrativeqa), ("qmsum", scrolls.qmsum)]
)
def test_several_answers_to_one_question_are_one_row(hub, name, read):
    hub(name, [row("a", f"Who?\n\n{STORY}", "fox"), row("a", f"Who?\n\n{STORY}", "a fox"), row("b", "Why?\n\nx", "y")])
    first, second = read()
    assert first["prompt"] == f"{STORY}\n\nQuestion: Who?\nAnswer:"
    assert (first["answers"], second["answers"]) == (["fox", "a fox"], ["y"])


@pytest.mark.parametrize(
    ("name", "read"), [("gov_report", scrolls.gov_report), ("summ_screen_fd", scrolls.summ_screen)]
)
def test_summaries_are_asked_for_after_the_text(hub, name, read):
    hub(name, [row("a", STORY, "A fox jumps.")])
    [asked] = read()
    assert asked["prompt"] == f"{STORY}\n\nQuestion: What is a summary of the preceding text?\nAnswer:"
    assert asked["answers"] == ["A fox jumps."]


def test_choices_of_quality_stand_between_question_and_text(hub):
    choices = "(A) A cat\n (B) A  fox\n (C) A dog\n (D) Nobody knows"
    hub("quality", [row("a", f"Who jumped?\n\n {choices}\n\n{STORY}", "A fox")])
    [asked] = scrolls.quality()
    assert asked["choices"] == ["A cat", "A fox", "A dog", "Nobody knows"]
    assert asked["gold"] == 1
    assert asked["prompt"] == f"{STORY}\n\nQuestion: Who jumped?\nAnswer:"


def test_a_contract_entails_a_hypothesis_or_not(hub):
    hub("contract_nli", [row("a", f"A fox jumps.\n\n{STORY}", "Entailment")])
    [asked] = scrolls.contract_nli()
    assert asked["choices"][asked["gold"]] == "Entailment"
    assert asked["prompt"] == f"{STORY}\n\nHypothesis: A fox jumps.\nConclusion:"


def test_a_damaged_archive_is_named(hub, tmp_path):
    (tmp_path / "qmsum.zip").write_bytes(b"nothing")
    with pytest.raises(DocumentError, match=r"qmsum.zip: expected qmsum/validation.jsonl with id, input and output"):
        scrolls.qmsum()
    hub("qmsum", [{"id": "a"}])
    with pytest.raises(DocumentError, match="'input'"):
        scrolls.qmsum()
