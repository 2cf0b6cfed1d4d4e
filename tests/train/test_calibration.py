import json

import pytest
from families import tiny
from one_extension import RECIPE, WORDS, Letters, corpus_in, llama

from lococo.compressors.heads import load_heads
from lococo.errors import ArgumentError
from lococo.shares import shares
from lococo.train.extend import extend
from lococo.train.extension import Extension


def test_layers_are_given_the_shares_that_were_measured_also_by_a_tuning_that_goes_on(tmp_path, monkeypatch):
    recipe = Extension(**RECIPE | {"calibration_windows": 3, "batch": 2, "held_out_windows": 0, "memory": 0.5})
    corpus_in(tmp_path / "texts", WORDS, WORDS[::-1])
    lines, steps = [], iter([False, True])

    def stopped(row):
        if next(steps, False):
            raise KeyboardInterrupt

    def tuned():
        options = {"base": None, "data": [str(tmp_path / "texts")], "save_every": 1, "say": lines.append}
        return extend(llama(), Letters(), recipe, tmp_path / "out", after_step=stopped, **options)

    with pytest.raises(KeyboardInterrupt):
        tuned()
    assert sum("nats from the full cache" in line for line in lines) == 4
    monkeypatch.setattr("lococo.train.extend.layer_weights", None)  # not measured a second time
    figures = tuned()
    settings = json.loads((tmp_path / "out" / "heads" / "config.json").read_text())["settings"]
    weights = settings["budgets"]["24"]
    assert settings["memory"] == 0.5
    assert weights == figures["layer_weights"]
    assert len(weights) == 4
    assert len({*weights}) > 1
    _, heads = load_heads(tmp_path / "out" / "heads", dict.fromkeys(range(4), 24), tiny().config.head_dim)
    assert heads.slots_per_layer(24) == shares(weights, 24, heads.min_slots())


def test_calibration_of_more_slots_than_its_texts_have_tokens(tmp_path):
    recipe = Extension(**RECIPE | {"calibration_windows": 1, "num_slots": 90, "length": 128})
    corpus_in(tmp_path / "text")
    with pytest.raises(ArgumentError, match=r"texts of up to 112 tokens .* and 90 slots and two chunks are 122"):
        extend(
            llama(max_position_embeddings=128),
            Letters(),
            recipe,
            tmp_path / "o",
            base=None,
            data=[str(tmp_path / "text")],
        )
    assert not (tmp_path / "o").exists()
