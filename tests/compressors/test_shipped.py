"""The heads that come with the package."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lococo
from lococo.compressors.heads import load_heads
from lococo.compressors.learned import LearnedHeads
from lococo.default_model import DEFAULT_MODEL

FOLDERS = sorted((Path(lococo.__file__).parent / "heads").glob("*/config.json"))


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda file: file.parent.name)
def folder(request):
    return request.param.parent


def heads_in(folder):
    settings = json.loads((folder / "config.json").read_text())["settings"]
    _, heads = load_heads(folder, dict.fromkeys(settings["layers"], 64), settings["head_dim"])
    assert isinstance(heads, LearnedHeads)
    return heads


def test_they_are_small_and_documented(folder):
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    card = (folder / "README.md").read_text()
    for subject in ("## Data", "## Training", "## Figures", "## Limits"):
        assert subject in card
    assert "@" not in card


@pytest.mark.parametrize("num_slots", [64, 100, 128, 256, 512])
def test_one_file_serves_any_number_of_slots(folder, num_slots):
    heads = heads_in(folder)
    shares = heads.slots_per_layer(num_slots)
    assert sum(shares) == num_slots * len(shares)
    assert min(shares) >= heads.min_slots()
    assert all(bool(parameter.isfinite().all()) for parameter in heads.parameters())


@torch.no_grad()
def test_a_model_of_the_same_shape_takes_them_by_default(folder):
    base = json.loads((folder / "config.json").read_text())["base_model"]
    config = LlamaConfig(
        vocab_size=base["vocab_size"],
        hidden_size=576,
        intermediate_size=8,
        num_hidden_layers=base["num_hidden_layers"],
        num_attention_heads=9,
        num_key_value_heads=base["num_key_value_heads"],
        head_dim=base["head_dim"],
        rope_parameters=base["rope"],
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(200)[None]
    logits = {}
    for name in ("auto", "lococo", "lococo-frozen", "mass-merge"):
        with lococo.attach(model, name, num_slots=64, chunk_size=32) as slots:
            assert slots.compressor.name == name.replace("auto", "lococo")
            logits[name] = model(ids, past_key_values=slots.new_cache()).logits
    assert torch.equal(logits["auto"], logits["lococo"])
    for name in ("lococo-frozen", "mass-merge"):
        assert not torch.allclose(logits["lococo"], logits[name], atol=1e-4)


def test_the_default_model_has_heads():
    assert [file.parent.name for file in FOLDERS] == [DEFAULT_MODEL]
