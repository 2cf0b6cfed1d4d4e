import copy
from dataclasses import replace

import pytest
import torch
from families import ROTATING, tiny

from lococo.errors import UnsupportedModelError
from lococo.probe import modeling_function, probed
from lococo.rope import TABLE, Rotary


def angles(model, layer_idx, positions):
    embedding = model.base_model.rotary_emb
    kinds = getattr(model.config, "layer_types", None)
    extra = (kinds[layer_idx],) if hasattr(embedding, "layer_types") else ()
    return embedding(torch.zeros(1), positions, *extra)


@pytest.mark.parametrize("family", ROTATING)
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_rotating_moves_a_key_to_another_position(family, layer_idx):
    model = tiny(family)
    rotary = Rotary(model.base_model).of_layer(layer_idx)
    raw = torch.randn(2, 3, 5, 12)
    apply = modeling_function(model.base_model, "apply_rotary_pos_emb")
    here, there = torch.tensor([[3.0, 4, 5, 6, 700]]), torch.tensor([[90.0, 1, 5, 6.5, 2]])
    at_here = apply(raw, raw, *angles(model, layer_idx, here))[1]
    at_there = apply(raw, raw, *angles(model, layer_idx, there))[1]
    torch.testing.assert_close(rotary.rotate(at_here, there - here), at_there, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", [*ROTATING, "gpt2"])
def test_the_matrix_rotates_as_rotate_does(family):
    rotary = Rotary(tiny(family).base_model).of_layer(1)
    x = torch.randn(2, 3, 5, 12)
    matrix = rotary.matrix(256.0, 12, x.device)
    torch.testing.assert_close(x @ matrix, rotary.rotate(x, torch.full((1, 1, 1), 256.0)))


@pytest.mark.parametrize("family", ROTATING)
def test_unrotating_leaves_the_scale_of_the_model(family):
    # YaRN scales what it rotates; that scale belongs to the stored key and must stay.
    model = tiny(family)
    rotary = Rotary(model.base_model).of_layer(1)
    raw = torch.randn(1, 1, 4, 12)
    cos, sin = angles(model, 1, torch.arange(4.0)[None])
    rotated = modeling_function(model.base_model, "apply_rotary_pos_emb")(raw, raw, cos, sin)[1]
    factor = angles(model, 1, torch.zeros(1, 1))[0].flatten()[0]
    width = cos.shape[-1]
    expected = torch.cat([raw[..., :width] * factor, raw[..., width:]], -1)
    torch.testing.assert_close(rotary.rotate(rotated, -torch.arange(4.0)[None, None]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ROTATING)
def test_angles_of_a_table_are_those_that_are_computed(family, monkeypatch):
    model, x = tiny(family), torch.randn(2, 3, 6, 12)
    delta = torch.tensor([1.0 - TABLE, -800, -1, 0, 17, TABLE - 1]).expand(2, 3, 6)
    looked_up = Rotary(model.base_model).of_layer(1).rotate(x, delta)
    monkeypatch.setattr("lococo.rope.TABLE", 0)
    computed = Rotary(model.base_model).of_layer(1).rotate(x, delta)
    torch.testing.assert_close(looked_up, computed, atol=1e-6, rtol=0)


def test_a_table_made_while_inferring_serves_gradients():
    rotary, delta = Rotary(tiny().base_model).of_layer(0), torch.ones(1, 1, 3)
    with torch.inference_mode():
        rotary.rotate(torch.randn(1, 1, 3, 12), delta)
        rotary.matrix(8.0, 12, torch.device("cpu"))
    x = torch.randn(1, 1, 3, 12, requires_grad=True)
    (rotary.rotate(x, delta) @ rotary.matrix(8.0, 12, x.device)).sum().backward()
    assert x.grad is not None


def test_a_model_that_changes_its_frequencies_is_asked_again():
    model = tiny()
    rotary, x, delta = Rotary(model.base_model).of_layer(0), torch.randn(1, 1, 3, 12), torch.full((1, 1, 1), 5.0)
    rotary.rotate(x, delta), rotary.matrix(5.0, 12, x.device)
    embedding = model.base_model.rotary_emb
    before = embedding.inv_freq
    try:
        embedding.inv_freq = before / 2
        halved = rotary.rotate(x, delta)
        torch.testing.assert_close(halved, Rotary(model.base_model).of_layer(0).rotate(x, delta))
        torch.testing.assert_close(halved, x @ rotary.matrix(5.0, 12, x.device))
    finally:
        embedding.inv_freq = before
    assert not torch.allclose(rotary.rotate(x, delta), halved)


def test_a_model_without_rope_gets_the_identity():
    x = torch.randn(1, 2, 3, 12)
    assert Rotary(tiny("gpt2").base_model).of_layer(0).rotate(x, torch.ones(1, 1, 3)) is x


def test_asking_for_an_angle_does_not_change_the_model():
    model = tiny("llama-yarn")
    before = model.base_model.rotary_emb.inv_freq.clone()
    Rotary(model.base_model).of_layer(0).rotate(torch.randn(1, 1, 1, 12), torch.full((1, 1, 1), 1e6))
    assert torch.equal(model.base_model.rotary_emb.inv_freq, before)


def test_a_model_that_hides_its_angles_is_refused(monkeypatch):
    decoder = tiny("qwen2").base_model
    probe = probed(decoder)
    monkeypatch.delitem(decoder._modules, "rotary_emb")
    with pytest.raises(UnsupportedModelError, match="no `rotary_emb`"):
        Rotary(decoder, probe)


def test_a_rotation_that_does_not_explain_the_keys_is_refused():
    decoder = tiny("qwen2").base_model
    probe = probed(decoder)
    here, there = probe.cached[2][0][:, None]
    turned = torch.stack([here[0], there[0].flip(-1)])
    with pytest.raises(UnsupportedModelError, match=r"rotates the keys of layer 2 otherwise"):
        Rotary(decoder, replace(probe, cached=probe.cached | {2: (turned, probe.cached[2][1])}))


def test_the_probe_leaves_the_model_as_it_was():
    decoder = copy.deepcopy(tiny("gemma2").base_model).train()
    decoder.layers[1].eval()
    before = {name: module.training for name, module in decoder.named_modules()}
    state = torch.get_rng_state()
    assert set(probed(decoder).attention) == {0, 1, 2, 3}
    assert decoder.config._attn_implementation == "eager"
    assert {name: module.training for name, module in decoder.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
