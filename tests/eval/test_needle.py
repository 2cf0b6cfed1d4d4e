from dataclasses import replace

import pytest
from families import tiny
from test_perplexity import document, write

from lococo.attachment import attach
from lococo.compressors.heads import save_heads
from lococo.errors import ArgumentError, DocumentError
from lococo.eval import needle
from lococo.facts import ModelFacts


@pytest.fixture
def data(tmp_path):
    for number in range(4):
        write(tmp_path / "books" / f"{number}.txt", document(600, number))
        write(tmp_path / "web" / f"{number}.txt", document(300, 10 + number))
    return tmp_path


def test_trials_hide_the_needle_at_every_depth(tokenizer, data):
    trials = needle.make_trials(tokenizer, data, 120, 10)
    assert [round(trial.depth, 2) for trial in trials] == [0, 0.11, 0.22, 0.33, 0.44, 0.56, 0.67, 0.78, 0.89, 1]
    assert {len(trial.ids) for trial in trials} == {120}
    # The words of needle and question are unknown to this tokenizer, which makes them 0.
    assert trials[0].ids[:8] == [0] * 8
    assert trials[9].ids[:8] != [0] * 8
    assert all(len(trial.value) == 5 for trial in trials)
    assert trials == needle.make_trials(tokenizer, data, 120, 10)
    assert trials != needle.make_trials(tokenizer, data, 120, 10, seed=1)


def test_an_answer_counts_if_it_begins_with_the_value(tokenizer, data, monkeypatch):
    trials = needle.make_trials(tokenizer, data, 120, 20)
    said = iter([[1]] * 20 + [[2]] * 20)
    monkeypatch.setattr(needle, "stream", lambda *arguments, **options: next(said))
    values = iter([f" {trial.value}. And" for trial in trials] + ["no"] * 20)
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: next(values))
    rows = needle.evaluate(
        tiny(), tokenizer, data=data, compressors=["h2o"], num_slots=40, chunk_size=16, lengths=[120], trials=20
    )
    assert [(row["compressor"], row["accuracy"]) for row in rows] == [("full", 1.0), ("h2o", 0.0)]
    assert rows[0]["by_depth"].keys() == {"0.0", "0.11", "0.22", "0.33", "0.44", "0.56", "0.67", "0.78", "0.89", "1.0"}
    assert rows[0]["low"] == pytest.approx(0.8389, abs=1e-4)
    assert rows[1]["high"] == pytest.approx(0.1611, abs=1e-4)


def test_enough_slots_answer_as_the_full_cache(tokenizer, data):
    rows = needle.evaluate(
        tiny(), tokenizer, data=data, compressors=["h2o"], num_slots=200, chunk_size=16, lengths=[120], trials=3
    )
    assert rows[0]["correct"] == rows[1]["correct"]


def test_beyond_the_window_the_full_cache_is_left_out(tokenizer, tmp_path):
    write(tmp_path / "books" / "long.txt", document(1100, 0))
    options = {"data": tmp_path, "compressors": ["h2o"], "num_slots": 40, "chunk_size": 16}
    rows = needle.evaluate(tiny(), tokenizer, lengths=[1017, 1018], trials=1, **options)
    assert [(row["length"], row["compressor"]) for row in rows] == [(1017, "full"), (1017, "h2o"), (1018, "h2o")]


def test_texts_side_by_side_are_answered_as_alone(tokenizer, data, monkeypatch):
    said, made = [], needle.make_trials
    # Keys and values have more and less tokens, so that texts differ in length by a few.
    shortened = lambda *a: [replace(t, ids=t.ids[n % 3 :]) for n, t in enumerate(made(*a))]  # noqa: E731
    monkeypatch.setattr(needle, "make_trials", shortened)
    own = needle.stream
    monkeypatch.setattr(needle, "stream", lambda *a, **o: said.append(list(own(*a, **o))) or said[-1])
    for batch in (1, 3):
        options = {"num_slots": 40, "chunk_size": 16, "lengths": [120], "trials": 4, "batch": batch}
        needle.evaluate(tiny(), tokenizer, data=data, compressors=["mass-merge"], **options)
    assert len(said) == 16
    assert said[:8] == said[8:]
    assert len({tuple(answer) for answer in said[:8]}) > 4


def test_wilson():
    assert needle.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_what_cannot_be_tried(tokenizer, data):
    options = {"data": data, "compressors": ["h2o"], "num_slots": 40, "chunk_size": 16}
    with pytest.raises(ArgumentError, match="no room for a text"):
        needle.evaluate(tiny(), tokenizer, lengths=[20], trials=2, **options)
    with pytest.raises(ArgumentError, match="window of 1024"):
        needle.evaluate(tiny(), tokenizer, lengths=[1024], trials=2, **options | {"compressors": ["full"]})
    with pytest.raises(DocumentError, match=r"texts of .* tokens for 500 trials"):
        needle.evaluate(tiny(), tokenizer, lengths=[120], trials=500, **options)


def test_folders_of_heads_go_by_their_names(tokenizer, data, tmp_path):
    facts = ModelFacts.of(tiny())
    for place in ("one", "other"):
        attached = attach(tiny(), "lococo-paper", num_slots=40, chunk_size=16)
        save_heads(attached.compressor.merge, tmp_path / place / "heads", facts)
    options = {"data": data, "num_slots": 40, "chunk_size": 16, "lengths": [120], "trials": 1}
    rows = needle.evaluate(tiny(), tokenizer, compressors=[str(tmp_path / "one/heads")], **options)
    assert [row["compressor"] for row in rows] == ["full", "heads"]
    with pytest.raises(ArgumentError, match="full, heads, heads; rename folders"):
        needle.evaluate(
            tiny(), tokenizer, compressors=[str(tmp_path / "one/heads"), str(tmp_path / "other/heads")], **options
        )
