from copy import deepcopy

import pytest
import torch
from families import SMALL, WINDOW, tiny, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from lococo.attachment import window_of
from lococo.errors import ArgumentError, UnsupportedModelError
from lococo.rope_scaling import apply_rope, scaled_rope


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
@torch.no_grad()
def test_a_scaled_model_is_the_one_that_is_loaded_with_these_settings(tmp_path, scaling):
    model, ids = deepcopy(tiny()), tokens(1, 60)
    settings = scaled_rope(model, scaling, 8 * WINDOW)
    before = model(ids).logits
    apply_rope(model, settings)
    assert window_of(model) == 8 * WINDOW
    assert model.config.rope_parameters["factor"] == 8.0
    loaded = LlamaForCausalLM(LlamaConfig(**SMALL | settings)).eval()
    loaded.load_state_dict(model.state_dict())
    after = model(ids).logits
    assert torch.equal(after, loaded(ids).logits)
    assert (after - before).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, after, rtol=0, atol=1e-5)


@torch.no_grad()
def test_linear_divides_positions():
    model, ids = deepcopy(tiny()), tokens(1, 60)
    positions = torch.arange(60)[None]
    expected = model(ids, position_ids=positions / 4).logits
    apply_rope(model, scaled_rope(model, "linear", 4 * WINDOW))
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-4)


def test_none_changes_nothing():
    assert scaled_rope(tiny(), "none", 10 * WINDOW) == {}


@pytest.mark.parametrize(
    ("family", "came"), [("llama3", "llama3"), ("llama-yarn", "yarn"), ("gemma3", "another one per type of layer")]
)
def test_a_rope_that_cannot_be_scaled(family, came):
    with pytest.raises(UnsupportedModelError, match=f"is of type {came}, and only an unscaled one"):
        scaled_rope(tiny(family), "linear", 10**6)


def test_a_model_without_rope():
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel has no RoPE that could be scaled"):
        scaled_rope(tiny("gpt2"), "yarn", 10**6)


def test_a_window_that_is_long_enough():
    with pytest.raises(ArgumentError, match="windows of 1024 tokens fit the model's 1024"):
        scaled_rope(tiny(), "linear", WINDOW)
