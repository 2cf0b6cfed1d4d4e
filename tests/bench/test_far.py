import json

import pytest
import torch
from commands import WORDS, save_llama

from lococo.attachment import attach
from lococo.bench import far
from lococo.cache import fork
from lococo.errors import ArgumentError
from lococo.models import load_model
from lococo.reader import prefill


def test_each_length_has_its_row(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(WORDS * 40)
    file = tmp_path / "far.jsonl"
    few = {"num_slots": 16, "chunk_size": 8, "tokens": 8, "decode_tokens": 2, "compressor": "h2o"}
    far.main(str(tmp_path / "a.txt"), str(file), (24, 48, 96), rounds=6, model=save_llama(tmp_path / "m"), **few)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["length"] for row in rows] == [24, 48, 96]
    assert len({row["kv_bytes"] for row in rows}) == 1
    for row in rows:
        assert row["task"] == "far"
        assert all(row[figure] > 0 for figure in far.FIGURES)
        for middle, low, high in row["ratio"].values():
            assert low <= middle <= high
    assert all(ratio == [1.0, 1.0, 1.0] for ratio in rows[0]["ratio"].values())
    assert "96 tokens read" in capsys.readouterr().out
    far.main(str(tmp_path / "a.txt"), str(file), (24, 48, 96), rounds=6, model=str(tmp_path / "m"), **few)
    assert "tokens read" not in capsys.readouterr().out
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows


def held(cache):
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def test_caches_take_turns_and_stay_as_they_are(tmp_path, monkeypatch):
    model, tokenizer = load_model(save_llama(tmp_path / "m"))
    ids = torch.tensor([tokenizer(WORDS * 10)["input_ids"]])
    order = []
    monkeypatch.setattr(far, "fork", lambda cache: order.append(caches.index(cache)) or fork(cache))
    with attach(model, "h2o", num_slots=16, chunk_size=8) as slots:
        caches = []
        for length in (24, 48):
            cache = slots.new_cache()
            prefill(model, ids[:, :length], cache)
            caches.append(cache)
        before = [held(cache) for cache in caches]
        measured = far.behind(model, caches, ids[:, :8], decode_tokens=2, rounds=3)
        for cache, was in zip(caches, before, strict=True):
            torch.testing.assert_close(held(cache), was, rtol=0, atol=0)
    # Once to get warm, then each round begins with another one.
    assert order == [1, 0, 0, 1, 1, 0, 0, 1]
    assert [len(rounds) for rounds in measured] == [3, 3]


def test_ratios_are_of_the_same_round():
    def seconds(*values):
        return [dict.fromkeys(far.FIGURES, value) for value in values]

    # A machine that grew slow after two rounds for the one, three for the other: medians alone would say 0.011 times.
    row = far.compared(seconds(1.1, 110.0, 1.1, 110.0, 1.1), seconds(1.0, 100.0, 1.0, 100.0, 100.0))
    assert row["ratio"]["read_s_per_token"] == [pytest.approx(1.1), None, None]
    assert row["decode_s_per_token"] == 1.1
    middle, low, high = far.compared(seconds(*[1.0, 1.2] * 5), seconds(*[1.0] * 10))["ratio"]["decode_s_per_token"]
    assert (low, middle, high) == (1.0, pytest.approx(1.1), 1.2)
    assert far.compared(seconds(2.0), seconds(1.0))["ratio"]["decode_s_per_token"] == [2.0, None, None]


def test_what_cannot_be_measured_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    text, file = str(tmp_path / "a.txt"), str(tmp_path / "far.jsonl")
    for lengths in ((), (64, 32), (32, 32), (0, 32)):
        with pytest.raises(ArgumentError, match="in rising order"):
            far.main(text, file, lengths)
    for other in ({"rounds": 0}, {"decode_tokens": 0}, {"tokens": 8, "decode_tokens": 9}):
        with pytest.raises(ArgumentError, match="1 or more rounds"):
            far.main(text, file, (32,), **other)
