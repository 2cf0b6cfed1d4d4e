import re

from lococo.eval import needle
from lococo.train import recall
from lococo.train.data import corpus_of


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) for letter in text]}


def corpus_in(folder):
    (folder / "a.txt").write_text(" ".join(f"play {word}" for word in range(4000)))
    return corpus_of([str(folder)], Letters(), documents=1, seed=0)[0]


def test_answers_are_asked_where_the_text_holds_them(tmp_path):
    corpus = corpus_in(tmp_path)
    for number in range(20):
        window = recall.recall_window(corpus, corpus.tokenizer, 3, number, length=2048, least=1024)
        text = "".join(map(chr, window.ids))
        assert len(text) == 2048
        asked = "".join(text[place + 1] for place in window.asked)
        answers = [answer for answer in asked.split(" ") if answer]
        assert len(answers) == recall.FACTS
        # Once where it is stated, once where it is told.
        assert all(text.count(answer) >= 2 for answer in answers)


def test_windows_are_the_same_for_the_same_seed_and_number(tmp_path):
    corpus = corpus_in(tmp_path)
    first, again, other = (
        recall.recall_window(corpus, corpus.tokenizer, seed, 1, length=600, least=300) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(first.ids) == 600


def test_no_form_is_that_of_the_needle_task():
    words = {word.lower() for word in (*needle.NAMES, *needle.PLACES, "secret")}
    for form in recall.FORMS:
        assert not words & set(re.findall(r"[a-z]+", " ".join(form).lower()))
    # Neither does any state or ask "the ... of ... is ...", nor follow "Question:" and "Answer:".
    for statement, question, answer in recall.FORMS:
        for text in (statement, question, answer):
            assert not re.search(r"\bof\b.*\bis \{", text)
            assert not re.search(r"[Nn]umber of|[Ss]ecret", text)
    assert not any("Question" in frame or "Answer" in frame for frame in recall.FRAMES)
    for choices in recall.VALUES.values():
        assert not words & {word.lower() for choice in choices for word in choice.split()}
