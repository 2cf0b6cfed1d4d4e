import pytest

from lococo.eval import metrics


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Pink Floyd", ["Pink Floyd"], 1.0),
        ("the Pink Floyd.", ["pink floyd"], 1.0),  # articles, case and punctuation do not count
        ("a band called Pink Floyd", ["Pink Floyd"], 2 * 2 / (4 + 2)),
        ("Pink", ["Pink Floyd"], 2 * 1 / (1 + 2)),
        ("blue", ["Pink Floyd"], 0.0),
        ("the the cat cat", ["cat cat cat"], 2 * 2 / (2 + 3)),  # as often as it occurs in both
        ("1082", ["1081", "in 1082"], 2 * 1 / (1 + 2)),  # of the nearest answer
        ("", ["cat"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_f1_is_that_of_squad(prediction, answers, expected):
    assert metrics.f1(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Rollo", ["Rollo"], 1),
        (" rollo!", ["Rollo"], 1),
        ("A Rollo", ["the rollo"], 1),
        ("Rollo the Viking", ["Rollo"], 0),
        ("February 1082", ["1082", "February, 1082"], 1),
        ("ab", ["a b"], 0),
    ],
)
def test_exact_match_is_that_of_squad(prediction, answers, expected):
    assert metrics.exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "one", "two", "longest"),
    [
        ("the cat sat", ["the cat sat"], 1, 1, 1),
        # 3 of 6 and 4 words; 2 of 5 and 3 pairs; the longest common subsequence has 3.
        ("the cat sat on the mat", ["the cat sat down"], 2 * 3 / 10, 2 * 2 / 8, 2 * 3 / 10),
        ("mat the on sat", ["sat on the mat"], 1, 0, 2 * 1 / 8),
        ("dogs", ["cats"], 0, 0, 0),
        ("cats ran", ["cat ran"], 0.5, 0, 0.5),  # no stemming
        ("a b c d", ["a b", "c d e"], 2 * 2 / 6, 2 * 1 / 4, 2 * 2 / 6),  # of each the better one
    ],
)
def test_rouge_is_worked_out_by_hand(prediction, answers, one, two, longest):
    pytest.importorskip("rouge_score")
    found = metrics.rouge(prediction, answers)
    assert found == pytest.approx({"rouge1": one, "rouge2": two, "rougeL": longest})


def test_rouge_of_many_is_the_geometric_mean_of_means():
    scores = {"rouge1": [0.4, 0.8], "rouge2": [0.1, 0.3], "rougeL": [0.2, 0.6]}
    assert metrics.overall("rouge", scores) == pytest.approx((0.6 * 0.2 * 0.4) ** (1 / 3))
    assert metrics.overall("rouge", scores, [1, 1]) == pytest.approx((0.8 * 0.3 * 0.6) ** (1 / 3))
    assert metrics.overall("rouge1", scores, [0]) == 0.4


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (" 123, 456", ["123", "456"], 1),
        (" 123", ["123", "456"], 0.5),
        ("none", ["123"], 0),
        ("VAR abcde", ["ABCDE"], 1),
        ("12", ["123"], 0),
        ("4123", ["123"], 1),  # as RULER counts, inside of words as well
    ],
)
def test_found_is_the_share_of_answers_that_occur(prediction, answers, expected):
    assert metrics.found(prediction, answers) == expected


def test_intervals_resample_documents_with_all_their_questions():
    scores = {"acc": [1.0] * 6 + [0.0] * 6}

    def interval(documents):
        return metrics.interval(list(documents), lambda which: metrics.overall("acc", scores, which))

    low, high = interval("abcdefghijkl")
    lower, higher = interval("aabbccddeeff")
    assert 0 < lower < low < 0.5 < high < higher < 1


def test_nothing_is_said_of_few_documents():
    scores = {"acc": [1.0] * 8}
    for documents in ("aaaabbbb", "aaaaaaaa", "aaabcdee"):
        assert metrics.interval(list(documents), lambda which: metrics.overall("acc", scores, which)) == (None, None)
