import json
from copy import deepcopy

import pytest
import torch
from families import tiny, tokens

import lococo
from lococo.budgets import calibrated, calibration_weights, pyramid, shares
from lococo.errors import ArgumentError


def test_shares_keep_the_total_and_the_least():
    assert shares([1, 1, 2], 8, least=2) == [7, 6, 11]
    for weights in ([0, 0, 1], [3, 1, 0.1, 7], [1] * 7):
        slots = shares(weights, 20, least=5)
        assert sum(slots) == 20 * len(weights)
        assert min(slots) >= 5
    assert shares([0, 0, 1], 20, least=5) == [5, 5, 50]
    with pytest.raises(ArgumentError, match="cannot give every layer 9"):
        shares([1, 2], 8, least=9)


def test_shares_keep_the_most_and_hand_on_what_is_over():
    assert shares([1, 1, 8], 20, least=5, most=30) == [15, 15, 30]
    assert shares([1, 7, 8], 20, least=5, most=25) == [10, 25, 25]
    assert shares([0, 0, 1], 20, least=5, most=30) == [15, 15, 30]
    assert shares([1, 2, 3], 20, least=5, most=20) == [20, 20, 20]
    # what cannot be kept is not heeded: whoever asked for so many slots is told elsewhere
    assert shares([1, 1, 8], 20, least=5, most=10) == shares([1, 1, 8], 20, least=5)
    assert shares([1, 1, 8], 20, least=5, most=200) == shares([1, 1, 8], 20, least=5)


def test_pyramid_falls_from_three_halves_to_one_half():
    slots = pyramid(30, 64)
    assert sum(slots) == 30 * 64
    assert slots == sorted(slots, reverse=True)
    assert (slots[0], slots[-1]) == (95, 33)
    assert pyramid(1, 10) == [10]
    # no layer gets less than the compressor needs
    slots = lococo.slots_for(tiny(), None, "pyramid", compressor="snapkv", num_slots=34, chunk_size=16)
    assert sum(slots) == 4 * 34
    assert min(slots) == 33
    # nor more than fits the window of 1,024
    slots = lococo.slots_for(tiny(), None, "pyramid", compressor="h2o", num_slots=900, chunk_size=64)
    assert sum(slots) == 4 * 900
    assert max(slots) == 960


def test_calibration_gives_the_sensitive_layers_more(monkeypatch):
    model = tiny()
    ids = tokens(1, 200)
    # Layer 2 alone decides: the others add nothing to the residual stream.
    for i in (0, 1, 3):
        monkeypatch.setattr(model.model.layers[i].self_attn.o_proj, "forward", lambda x: x[..., :48] * 0)
    lines = []
    slots = calibrated(
        model, ids, compressor="streaming-llm", num_slots=20, chunk_size=16, groups=4, progress=lines.append
    )
    assert slots == [5, 5, 65, 5]
    assert len(lines) == 4
    with lococo.attach(model, "streaming-llm", num_slots=20, chunk_size=16, slots_per_layer=slots) as attached:
        assert attached.new_cache().num_slots == 20


def test_texts_side_by_side_are_measured_as_one_after_the_other_and_weights_follow_the_power():
    model, ids = tiny(), tokens(3, 120)
    options = {"compressor": "mass-merge", "num_slots": 20, "chunk_size": 16, "groups": 4}
    alone = calibration_weights(model, list(ids.split(1)), **options)
    assert calibration_weights(model, [ids], **options) == pytest.approx(alone, rel=1e-3)
    weighed = calibration_weights(model, [ids], power=2 / 3, **options)
    assert weighed == pytest.approx([weight**1.2 for weight in alone], rel=1e-3)


def test_a_model_in_half_precision_is_measured_in_float32():
    rounded = deepcopy(tiny()).to(torch.bfloat16)
    twin = deepcopy(rounded).float()
    # What RoPE computes with is float32 in both.
    rounded.model.rotary_emb = deepcopy(twin.model.rotary_emb)
    weights = {name: tensor.clone() for name, tensor in rounded.state_dict().items()}
    options = {"compressor": "h2o", "num_slots": 20, "chunk_size": 16, "groups": 4}
    measured = [calibration_weights(model, [tokens(1, 120)], **options) for model in (rounded, twin)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-3)
    assert {name: (tensor.dtype, True) for name, tensor in weights.items()} == {
        name: (tensor.dtype, torch.equal(tensor, weights[name])) for name, tensor in rounded.state_dict().items()
    }


def test_a_calibration_is_done_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr("lococo.budgets.calibrated", lambda *args, **kwargs: calls.append(args) or [10, 20, 30, 20])
    monkeypatch.setattr("lococo.budgets.encode_stream", lambda tokenizer, text: iter([[1] * 3000]))
    for _ in range(2):
        slots = lococo.slots_for(tiny(), None, "calibrated", compressor="h2o", num_slots=20, chunk_size=16)
        assert slots == [10, 20, 30, 20]
    assert len(calls) == 1
    (kept,) = (tmp_path / "budgets").iterdir()
    assert json.loads(kept.read_text()) == slots
    kept.write_text("damaged")
    assert lococo.slots_for(tiny(), None, "calibrated", compressor="h2o", num_slots=20, chunk_size=16) == slots
    assert len(calls) == 2
    # the text that is read fits the window: one group is compressed, the others hold all of it
    assert calls[0][1].shape[1] == 1024 - 16
    assert lococo.slots_for(tiny(), None, "uniform", compressor="h2o", num_slots=20, chunk_size=16) == [20] * 4
    with pytest.raises(ArgumentError, match="unknown budget 'cubic'"):
        lococo.slots_for(tiny(), None, "cubic", compressor="h2o", num_slots=20, chunk_size=16)


def test_a_text_too_short_to_calibrate_on():
    options = {"compressor": "h2o", "num_slots": 20}
    with pytest.raises(ArgumentError, match="20 slots and chunks of 16 needs a text of more than 36 tokens, got 36"):
        calibrated(tiny(), tokens(1, 36), chunk_size=16, **options)
    # More than slots and chunk, but no token of it would be compared.
    with pytest.raises(ArgumentError, match="needs a text of more than 68 tokens, got 60"):
        calibrated(tiny(), tokens(1, 60), chunk_size=32, **options)
    assert sum(calibrated(tiny(), tokens(1, 69), chunk_size=32, **options)) == 80


def test_a_window_too_small_to_calibrate_in(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path))
    with pytest.raises(ArgumentError, match="on more than 804 tokens, and the model's window has room for 624; lower"):
        lococo.slots_for(tiny(), None, "calibrated", compressor="h2o", num_slots=20, chunk_size=400)
    assert list(tmp_path.iterdir()) == []
