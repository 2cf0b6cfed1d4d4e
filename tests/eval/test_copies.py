import json

import copies_of
import pytest

from lococo.errors import DocumentError
from lococo.eval import copies

READERS = {
    "hellaswag": copies.hellaswag,
    "winogrande": copies.winogrande,
    "arc_easy": copies.arc,
    "triviaqa": copies.triviaqa,
    "squad": copies.squad,
    "hotpotqa": copies.hotpotqa,
    "qmsum": copies.qmsum,
    "qasper_yesno": copies.qasper_yesno,
    "contract_nli": copies.contract_nli,
    "race": copies.race,
}


def problem(answer, options):
    return {"question": "?", "answer": answer, "options": list(options)}


@pytest.fixture
def data(tmp_path):
    copies_of.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"race"}))
def test_every_row_is_read_in_its_order(data, name):
    rows = READERS[name](data / name)
    assert len(rows) == 6
    assert len({json.dumps(row) for row in rows}) == 6


def test_questions_follow_their_text(data):
    asked = copies.squad(data / "squad")[3]
    assert asked["prompt"].endswith("lazy dog. \n\nQuestion: Who jumps 3?\nAnswer:")
    assert (asked["answers"], asked["document"]) == (["fox"], copies.squad(data / "squad")[1]["document"])
    passages = copies.hotpotqa(data / "hotpotqa")[0]["prompt"]
    assert passages.startswith("Passage 1:\nFox\nIt jumps.\nPassage 2:\nDog\n")


def test_choices_are_ours_where_the_copy_spells_them_otherwise(data):
    asked = copies.contract_nli(data / "contract_nli")[0]
    assert asked["choices"][asked["gold"]] == "Not mentioned"
    assert asked["prompt"].endswith("Hypothesis: Dog 0 jumps.\nConclusion:")


def test_a_copy_in_several_files_keeps_texts_apart(data):
    copies_of.write(data / "squad/test_docs.jsonl", [{"doc_id": 0, "text": "Another."}])
    copies_of.write(data / "squad/test_questions.jsonl", [{"doc_id": 0, "question": "?", "answers": ["x"]}])
    prompts = [row["prompt"] for row in copies.squad(data / "squad")]
    assert prompts[0].startswith("Another.")
    assert prompts[1].startswith("The quick brown fox")


def test_stories_hold_what_was_said_before_a_question(data):
    rows = copies.babi(data / "babi", 1)
    assert [row["prompt"] for row in rows[:2]] == [
        "John went home.\nQuestion: Where is John?\nAnswer:",
        "John went home.\nMary went out.\nQuestion: Where is Mary?\nAnswer:",
    ]
    assert rows[2]["prompt"] == rows[0]["prompt"]  # numbering begins again: another story
    assert [row["choices"][row["gold"]] for row in rows[:2]] == ["home", "out"]


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("arc_easy", "no json", "line 7: expected a JSON object with question"),
        ("arc_easy", "[1]", r"line 7: expected a JSON object .* got \[1\]"),
        ("arc_easy", '{"question": "?", "choices": ["a"]}', "line 7: expected gold to be a whole number, got None"),
        ("arc_easy", '{"question": "?", "choices": ["a"], "gold": 1}', "line 7: expected the number of one of 1"),
        ("winogrande", '{"sentence": "", "option1": "", "option2": "", "answer": "3"}', "line 7: .* out of 1, 2"),
        ("hellaswag", '{"ctx_a":"","ctx_b":"","activity_label":"","endings":[],"label":"x"}', "line 7: .*label .*'x'"),
        ("winogrande", '{"sentence": "x", "option1": "a", "option2": "b", "answer": "1"}', "line 7: .* with one _"),
        ("arc_easy", '{"question": "?", "choices": ["a", ""], "gold": 0}', "line 7: .* not empty"),
        ("triviaqa", '{"question": "?", "answer": "a", "aliases": [1]}', "line 7: .* not empty"),
        ("squad", '{"doc_id": 0, "question": "?", "answers": []}', "line 7: .* not empty"),
        ("race", '{"article": "?"}', "line 1: expected problems to be text, got None"),
        (
            "hotpotqa",
            '{"question": "?", "answer": "", "paragraphs": [{"title": ""}]}',
            "line 7: expected paragraphs .* 'title' and 'text'",
        ),
        ("hotpotqa", '{"question": "?", "answer": "", "paragraphs": ["x"]}', "line 7: expected paragraphs .* got 'x'"),
        ("arc_easy", '{"question": "?", "choices": ["a", "b"], "gold": true}', "line 7: expected gold to be a whole n"),
        ("arc_easy", "[" * 100_000, "line 7: expected a JSON object with question"),
        ("race", '{"article": "?", "problems": "[{"}', "line 1: expected problems to spell a list of objects"),
        ("race", '{"article": "?", "problems": "[3]"}', "line 1: expected problems to spell a list of objects"),
        ("race", '{"article": "?", "problems": "[]"}', "line 1: expected one problem or more"),
        ("race", json.dumps({"article": "?", "problems": str([problem("A", "ab")])}), "line 1: expected four options"),
        ("race", json.dumps({"article": "?", "problems": str([problem("E", "abcd")])}), "line 1: .* out of A, B, C, D"),
    ],
)
def test_a_malformed_line_is_named(data, name, line, said):
    (data / "race").mkdir()
    (data / "race/test.jsonl").write_text("")
    file = sorted((data / name).glob("*.jsonl"))[-1]
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DocumentError, match=said) as caught:
        READERS[name](data / name)
    assert str(file) in str(caught.value)


def test_a_question_about_no_text_is_named(data):
    copies_of.write(data / "squad/val_questions_6.jsonl", [{"doc_id": 9, "question": "?", "answers": ["x"]}])
    with pytest.raises(DocumentError, match=r"line 1: expected the doc_id of a text in val_docs.jsonl, got 9"):
        copies.squad(data / "squad")


def test_a_line_that_is_no_story_is_named(data):
    (data / "babi/qa1_facts_test.txt").write_text("1 John went home.\nJohn went out.\n")
    with pytest.raises(DocumentError, match="line 2: expected 'N sentence'"):
        copies.babi(data / "babi", 1)


def test_questions_of_one_story_or_text_have_one_document(data):
    rows = copies.babi(data / "babi", 1)
    assert rows[0]["document"] == rows[1]["document"] != rows[2]["document"]
    rows = copies.squad(data / "squad")
    assert [row["document"] == rows[0]["document"] for row in rows] == [True, False] * 3


def test_odd_characters_do_no_harm(data):
    file = data / "triviaqa/validation.jsonl"
    file.write_text('{"question": "Who \\ud800?", "answer": "a", "aliases": []}\n')
    [row] = copies.triviaqa(data / "triviaqa")
    assert row["question"].encode() == b"Who ??"
    assert row["answer"]["aliases"] == ["a"]
    (data / "babi/qa1_facts_test.txt").write_bytes(b"1 \xff\n")
    with pytest.raises(DocumentError, match="is not UTF-8"):
        copies.babi(data / "babi", 1)


def test_what_is_not_there_is_told_from_what_is_malformed(data):
    for read in (copies.arc, copies.squad, lambda folder: copies.babi(folder, 2)):
        with pytest.raises(FileNotFoundError):
            read(data / "babi")


def test_race_is_read_as_the_hub_spells_it(tmp_path):
    row = {"article": "A fox.", "problems": str([problem("B", "abcd"), problem("D", "efgh")])}
    copies_of.write(tmp_path / "test.jsonl", [row])
    assert copies.race(tmp_path) == [row]
