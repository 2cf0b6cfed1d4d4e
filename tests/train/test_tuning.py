from copy import deepcopy

import pytest
import torch
from families import heads_for, tiny, tokens
from one_extension import RECIPE, llama

import lococo
from lococo import compressors
from lococo.compressors.heads import save_heads
from lococo.errors import ArgumentError, FileFormatError, UnsupportedModelError
from lococo.facts import ModelFacts
from lococo.train import tuning
from lococo.train.extension import Extension
from lococo.train.tuning import starting_compressor, tune
from lococo.tuned import TUNED_FOR


def recipe(**options):
    return Extension(**RECIPE | options)


@pytest.fixture
def saved(tmp_path):
    """Heads on disk for the tiny Llama, and their weights."""
    heads = heads_for(tiny(), scale=0.1)
    save_heads(heads, tmp_path, ModelFacts.of(tiny()))
    return tmp_path, heads.state_dict()


@pytest.mark.parametrize("name", ["auto", "lococo", "folder"])
def test_heads_start_as_those_that_are_there(saved, monkeypatch, name):
    folder, weights = saved
    for module in (tuning, compressors):
        monkeypatch.setattr(module, "shipped_heads", lambda facts: folder)
    heads = tune(llama(), recipe(compressor=str(folder) if name == "folder" else name)).heads
    assert all(torch.equal(tensor, weights[key]) for key, tensor in heads.state_dict().items())


def test_heads_are_given_a_memory(saved):
    folder, _ = saved
    assert tune(llama(), recipe(compressor=str(folder), memory=0.5)).heads.form.memory == 0.5
    assert tune(llama(), recipe(compressor="fresh", memory=0.5)).heads.observes == {"queries", "remembered"}
    heads = heads_for(tiny(), memory=0.25)
    save_heads(heads, folder / "kept", ModelFacts.of(tiny()))
    assert tune(llama(), recipe(compressor=str(folder / "kept"))).heads.form.memory == 0.25
    assert tune(llama(), recipe(compressor=str(folder / "kept"), memory=0.0)).heads.form.memory == 0
    for options in ({"memory": 0.5}, {"calibration_windows": 1}):
        for name in ("h2o", "full", "lococo-paper"):
            with pytest.raises(ArgumentError, match=f"are for heads of lococo, got compressor '{name}'"):
                tune(llama(), recipe(compressor=name, **options))


def test_heads_without_their_norms_are_saved_without_them(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(compressors, "shipped_heads", lambda facts: saved[0])
    model = llama()
    heads = tune(model, recipe(compressor="lococo-frozen")).heads
    save_heads(heads, tmp_path / "again", ModelFacts.of(model))
    again = lococo.attach(tiny(), str(tmp_path / "again"), num_slots=24, chunk_size=16).compressor
    assert heads.norms is again.norms is None


def test_auto_goes_on_with_what_a_model_was_tuned_with(saved):
    folder, weights = saved
    model = llama()
    setattr(model, TUNED_FOR, str(folder))
    heads = tune(model, recipe(compressor="auto")).heads
    assert all(torch.equal(tensor, weights[key]) for key, tensor in heads.state_dict().items())
    for name in ("full", "h2o"):
        model = llama()
        setattr(model, TUNED_FOR, name)
        compressor = tune(model, recipe(compressor="auto")).compressor
        assert getattr(compressor, "name", compressor) == name


def test_another_selection_leaves_the_papers_heads_as_they_are():
    how = {"kernel_size": 7, "mix": 0.25, "seed": 3}
    alone = tune(llama(), recipe(compressor="lococo-paper", **how))
    paired = tune(llama(), recipe(compressor="h2o+lococo-paper", **how))
    assert paired.heads.settings == alone.heads.settings
    states = [each.heads.state_dict() for each in (alone, paired)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert [compressors.selection_of(each.compressor) for each in (alone, paired)] == ["chunk-mass", "h2o"]
    with pytest.raises(ArgumentError, match=r"unknown compressor 'h3o\+lococo-paper'"):
        starting_compressor(llama(), recipe(compressor="h3o+lococo-paper"))


def test_what_cannot_be_tuned_says_so():
    with pytest.raises(ArgumentError, match=r"windows of 256 tokens beyond the model's 128 positions; .* 'yarn'"):
        tune(llama(max_position_embeddings=128), recipe(compressor="full", length=256))
    tune(llama(max_position_embeddings=128), recipe(compressor="full", length=256, rope="yarn"))
    with pytest.raises(ArgumentError, match="vanish in float16; tune with --dtype bfloat16 or float32"):
        tune(llama().half(), recipe())


def test_without_heads_for_the_model_auto_makes_fresh_ones():
    heads = tune(llama(), recipe(compressor="auto")).heads
    assert heads.norms is None  # the model's own are tuned
    assert len(heads.scorers) == 0


def test_heads_of_another_model_are_refused(saved):
    with pytest.raises(FileFormatError, match=r"num_hidden_layers 4.*num_hidden_layers 2"):
        starting_compressor(llama(num_hidden_layers=2), recipe(compressor=str(saved[0])))


def test_the_papers_heads_have_the_papers_shape():
    heads = tune(llama(), recipe(compressor="lococo-paper", kernel_size=7, mix=0.25)).heads
    assert [tuple(c.weight.shape) for c in heads.convolutions.values()] == [(12, 24, 7)] * 4
    assert {float(mix) for mix in heads.mix.values()} == {0.25}


@torch.no_grad()
def test_a_model_that_is_ready_still_says_the_same():
    model, ids = llama(), tokens(1, 50)
    before = model(ids).logits
    made = tune(model, recipe())
    assert torch.equal(model(ids).logits, before)
    ranks = {tuple(p.shape) for name, p in made.groups[0].parameters.items() if "q_proj.lora_A" in name}
    assert ranks == {(2, 48)}
    assert len(made.groups[0].parameters) == 4 * 4 * 2
    assert len(made.modules) == 4 * 2 + 1
    assert all(p.dtype == torch.float32 for p in made.groups[0].parameters.values())


@torch.no_grad()
def test_fused_layers_of_gpt2_take_lora():
    model, ids = deepcopy(tiny("gpt2")), tokens(1, 50)
    before = model(ids).logits
    made = tune(model, recipe(lora_targets=("c_attn",)))
    for parameter in made.groups[0].parameters.values():
        parameter += 0.1
    assert (model(ids).logits - before).abs().max() > 0.1


def test_a_rope_that_cannot_be_scaled_is_refused_before_anything_is_changed():
    model = deepcopy(tiny("llama3"))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UnsupportedModelError, match="of type llama3, and only an unscaled one"):
        tune(model, recipe(rope="linear", length=1 << 20))
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_window_grows_with_rope():
    model = llama(max_position_embeddings=64)
    assert tune(model, recipe(rope="linear")).rope["max_position_embeddings"] == 128
    assert lococo.attachment.window_of(model) == 128
