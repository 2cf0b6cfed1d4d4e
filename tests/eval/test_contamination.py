from lococo.eval import contamination

RUN = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_thirteen_words_in_a_row_are_found_whatever_stands_between_them():
    texts = {"same": f"He said: {RUN}.", "less": RUN.rpartition(" ")[0], "other": RUN.replace("six", "sax")}
    corpus = ["nothing of it", f"As they say, {RUN.upper().replace(' ', ', ')}, and so on."]
    assert contamination.shared(texts, corpus) == {"same": RUN}


def test_a_run_does_not_cross_from_one_text_to_the_next():
    first, _, rest = RUN.partition(" six")
    assert contamination.shared({"a": RUN}, [first, f"six{rest}"]) == {}
