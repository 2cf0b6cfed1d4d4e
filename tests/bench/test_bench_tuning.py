import json

import pytest
from commands import WORDS, save_llama

from lococo.bench import tuning
from lococo.errors import ArgumentError, LococoError


def test_a_step_is_measured_at_each_length(tmp_path, monkeypatch):
    asked = []

    def measured(what, of):
        asked.append((what, of["recipe"]["compressor"], of["recipe"]["length"], of["recipe"]["chunk_size"]))
        if of["recipe"]["length"] == 2048 and of["recipe"]["compressor"] == "full":
            raise LococoError("out of memory")
        return {"peak_memory_bytes": 7, "seconds": 0.5}

    monkeypatch.setattr(tuning, "in_new_process", measured)
    file = tmp_path / "rows.jsonl"
    assert tuning.main("texts", str(file), lengths=(1024, 2048), num_slots=64) == 0
    assert asked == [
        ("tuning", name, n, n if name == "full" else 256) for n in (1024, 2048) for name in ("auto", "full")
    ]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["peak_memory_bytes"] for row in rows] == [7, 7, 7, None]
    assert rows[3]["failed"] == "out of memory"
    # What was measured is kept, whatever else is asked for; what failed is tried again.
    asked.clear()
    assert tuning.main("texts", str(file), lengths=(2048,), num_slots=64, compressor=("full",)) == 1
    assert tuning.main("texts", str(file), lengths=(1024, 2048), num_slots=64) == 0
    assert asked == [("tuning", "full", 2048, 2048)] * 2
    assert [json.loads(line)["peak_memory_bytes"] for line in file.read_text().splitlines()] == [7, 7, 7, None]
    with pytest.raises(ArgumentError, match="one or more of each"):
        tuning.main("texts", str(file), lengths=())


def test_a_step_runs_after_one_that_made_all_that_stays(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(WORDS * 400)
    recipe = {"num_slots": 64, "chunk_size": 32, "compressor": "h2o"}
    of_model = {"data": str(tmp_path / "text"), "model": save_llama(tmp_path / "m"), "dtype": "float32", "device": None}
    for length in (256, 512):
        seen = tuning.step(recipe | {"length": length}, **of_model)
        assert seen["peak_memory_bytes"] >= 0
        assert seen["seconds"] > 0
