"""Llama 2, the model of the paper: its real shapes without weights, and layers on several devices."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import dispatch_model
from commands import save_llama
from families import tiny, tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lococo
from lococo.bench.plan import known_config, plan
from lococo.compressors.base import SelectMerge
from lococo.compressors.paper import PaperHeads
from lococo.errors import UnsupportedModelError
from lococo.train.recipe import Recipe
from lococo.train.trained import new_heads

RECIPES = Path(__file__).parent.parent / "recipes"
SHAPES = {"meta-llama/Llama-2-7b-hf": (32, 32, 6_738_415_616), "meta-llama/Llama-2-13b-hf": (40, 40, 13_015_864_320)}


@pytest.fixture(scope="module", params=SHAPES)
def named(request: pytest.FixtureRequest) -> tuple[str, LlamaForCausalLM]:
    config = known_config(request.param)
    with torch.device("meta"):
        model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return request.param, model


@pytest.mark.parametrize("num_slots", [128, 512])
def test_the_papers_heads_have_the_papers_size(named: tuple[str, LlamaForCausalLM], num_slots: int) -> None:
    name, model = named
    layers, heads, parameters = SHAPES[name]
    assert sum(each.numel() for each in model.parameters()) == parameters
    with lococo.attach(model, "lococo-paper", num_slots=num_slots, chunk_size=512) as slots:
        assert (slots.facts.num_hidden_layers, slots.facts.num_key_value_heads) == (layers, heads)
        assert slots.slots_per_layer == [num_slots] * layers
        assert isinstance(slots.compressor, SelectMerge)
        assert isinstance(slots.compressor.merge, PaperHeads)
        with torch.device("meta"):
            made = PaperHeads(dict.fromkeys(range(layers), num_slots), slots.facts.head_dim, heavy_share=0)
    weights = sum(convolution.weight.numel() for convolution in made.convolutions.values())
    assert weights == layers * 2 * 128 * num_slots * 21
    if (layers, num_slots) == (32, 128):
        assert weights == 22_020_096  # "22.0 M" in the paper's table


def test_a_plan_counts_what_is_held(named: tuple[str, LlamaForCausalLM]) -> None:
    name, _ = named
    layers, heads, parameters = SHAPES[name]
    config = known_config(name)
    assert config is not None
    made = plan(config, name=name, context=16384, num_slots=512, chunk_size=512, compressor="lococo-paper")
    assert made.parameters == parameters
    token = layers * heads * 128 * 2 * 2
    assert made.full.cache == 16384 * token
    assert 1024 * token < made.slots.cache < 1.6 * 1024 * token  # queries and what belongs to each entry besides
    assert made.window == 4096


def test_the_recipe_is_the_papers(named: tuple[str, LlamaForCausalLM]) -> None:
    _, model = named
    flags = yaml.safe_load((RECIPES / "llama-2-7b.yaml").read_text("utf-8"))
    options = {name: value for name, value in flags.items() if name in Recipe.__dataclass_fields__}
    assert set(flags) - set(options) == {"model", "data", "documents", "dtype"}
    recipe = Recipe(**options)
    assert math.isclose(recipe.steps * recipe.accumulate * recipe.length, 104.9e6, rel_tol=0.001)
    heads = new_heads(model, recipe)
    assert isinstance(heads, PaperHeads)
    assert set(heads.slots_per_layer.values()) == {512}
    assert recipe.learning_rate == 0.05


@torch.no_grad()
def test_layers_may_lie_where_accelerate_puts_them(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tiny", layers=4)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokens(1, 100)
    expected, places = (
        [],
        {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
    )
    for compressor in ("mass-merge", "lococo-paper"):
        with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
            expected.append(model(ids, past_key_values=slots.new_cache()).logits)
    places |= {f"model.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(4)}
    dispatch_model(model, places, offload_dir=tmp_path / "offload")
    assert next(model.model.layers[3].parameters()).is_meta
    for compressor, logits in zip(("mass-merge", "lococo-paper"), expected, strict=True):
        with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
            torch.testing.assert_close(model(ids, past_key_values=slots.new_cache()).logits, logits)
    assert model(ids).logits.isfinite().all()


def test_layers_on_several_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(
        model, "hf_device_map", {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}, raising=False
    )
    with pytest.raises(UnsupportedModelError, match=r"lies on 2 devices \(0, 1\), and slots are kept on one; load it"):
        lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16)
    lococo.attach(model, "full")
    monkeypatch.setattr(model, "hf_device_map", {"model.layers.0": 0, "model.layers.1": "disk", "lm_head": "cpu"})
    lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16)
