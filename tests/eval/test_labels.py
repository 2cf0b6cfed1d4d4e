import pytest
from families import tiny

from lococo.errors import ArgumentError
from lococo.eval import perplexity, positions
from lococo.eval.labels import check_labels, label


@pytest.mark.parametrize(
    ("compressor", "expected"),
    [("h2o+mass-merge", "h2o+mass-merge"), ("a/heads", "heads"), ("a/paper-{num_slots}", "paper"), ("./b/", "b")],
)
def test_heads_are_called_as_their_folder(compressor, expected):
    assert label(compressor) == expected


def test_what_would_go_by_one_name_is_refused(tokenizer, tmp_path):
    check_labels(["h2o", "h2o", "a/heads", "b/others"])
    same = ["a/heads", "b/heads"]
    with pytest.raises(ArgumentError, match="by heads, heads; rename folders so that they differ"):
        check_labels(same)
    with pytest.raises(ArgumentError, match="rename folders"):
        perplexity.evaluate(tiny(), tokenizer, data=tmp_path, compressors=same, max_length=600)
    with pytest.raises(ArgumentError, match="rename folders"):
        positions.evaluate(tiny(), tokenizer, data=tmp_path, compressors=same, lengths=[10])
