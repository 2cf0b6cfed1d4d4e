"""LongBench's metrics, which come with lm-evaluation-harness, against what their definition gives by hand."""

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that only these metrics need
    longbench = pytest.importorskip("lm_eval.tasks.longbench.metrics", exc_type=ImportError)

CLASSES = ["sport", "water sport", "music", "art"]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("music", "music", 1),
        ("It is music or art", "music", 1 / 2),
        ("water sport", "water sport", 1),  # the class inside of the answer's name does not count
        ("water sport", "sport", 1 / 2),
        ("dance", "music", 0),
        ("art", "music", 0),
    ],
)
def test_classification(prediction, answer, expected):
    row = {"answers": [answer], "all_classes": CLASSES}
    assert longbench.get_classification_score(row, [prediction])["classification_score"] == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Paragraph 12", "Paragraph 12", 1),
        ("12", "Paragraph 12", 1),
        ("Paragraph 1 or 12", "Paragraph 12", 1 / 2),
        ("Paragraph 3", "Paragraph 12", 0),
        ("none", "Paragraph 12", 0),
        ("12 12 3", "Paragraph 12", 2 / 3),
    ],
)
def test_retrieval(prediction, answer, expected):
    row = {"answers": [answer]}
    assert longbench.get_retrieval_score(row, [prediction])["retrieval_score"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("return x", "return x", 1),
        ("# a comment\nreturn x", "return x", 1),  # the first line that is code
        ("```python\nreturn x\n```", "return x", 1),
        ("return y\nreturn x", "return x", 0.88),  # 7 of 8 letters
        ("\n\n  ", "return x", 0),
        ("abcd", "wxyz", 0),
    ],
)
def test_code_similarity(prediction, answer, expected):
    assert longbench.get_code_sim_score({"answers": [answer]}, [prediction])["code_sim_score"] == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [("5", "5", 1), ("There are 5", "5", 1), ("5 or 6", "5", 1 / 2), ("six", "6", 0), ("55", "5", 0)],
)
def test_count(prediction, answer, expected):
    assert longbench.get_count_score({"answers": [answer]}, [prediction])["count_score"] == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat", "the cat sat", 1),
        ("the cat", "the cat sat down", 2 * 1 * 0.5 / 1.5),
        ("dogs", "cats", 0),
        ("", "cats", 0),
        ("cat the", "the cat", 0.5),  # the longest common subsequence has one word
    ],
)
def test_rouge_l(prediction, answer, expected):
    found = longbench.get_rouge_score({"answers": [answer]}, [prediction])["rouge_score"]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("the cat", ["cat"], 1),
        ("black cat", ["cat"], 2 / 3),
        ("dog", ["cat", "dog"], 1),
        ("mouse", ["cat"], 0),
        ("a cat, a dog", ["dog and cat"], 2 * 2 / (2 + 3)),
    ],
)
def test_f1_of_questions(prediction, answers, expected):
    found = longbench.get_qa_f1_score({"answers": answers}, [prediction])["qa_f1_score"]
    assert found == pytest.approx(expected)
