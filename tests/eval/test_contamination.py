import pytest

from lococo.errors import DocumentError
from lococo.results import Results

pytest.importorskip("lm_eval")

from lococo.eval import contamination

RUN = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_thirteen_words_in_a_row_are_found_whatever_stands_between_them():
    texts = {"same": f"He said: {RUN}.", "less": RUN.rpartition(" ")[0], "other": RUN.replace("six", "sax")}
    corpus = ["nothing of it", f"As they say, {RUN.upper().replace(' ', ', ')}, and so on."]
    assert contamination.shared(texts, corpus) == {"same": RUN}


def test_a_run_does_not_cross_from_one_text_to_the_next():
    first, _, rest = RUN.partition(" six")
    assert contamination.shared({"a": RUN}, [first, f"six{rest}"]) == {}


def test_a_folder_without_texts_is_not_said_to_share_nothing(tmp_path):
    (tmp_path / "a.md").write_text(RUN)
    results = Results()
    with pytest.raises(DocumentError, match=r"holds no \.txt or \.jsonl file"):
        contamination.warn([], tmp_path, results, pytest.fail)
    assert results.rows == []
