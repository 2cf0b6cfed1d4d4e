"""Models that see images: what they make of a text's mask and positions is undone, and what cannot be is refused."""

import pytest
import torch
from families import SLIDING, SMALL, left_padded, tokens
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

import lococo
from lococo.errors import UnsupportedModelError

IMAGE = 120
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 4}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}


def seeing(kind: str) -> PreTrainedModel:
    """A tiny model that sees images of 16 x 16, of which it makes 4 tokens (Qwen2-VL: 1)."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "gemma3":
        text = Gemma3TextConfig(**SMALL | SLIDING | {"query_pre_attn_scalar": 12})
        vision = VISION | {"model_type": "siglip_vision_model"}
        tokens_of_image = {"image_token_index": IMAGE, "boi_token_index": 121, "eoi_token_index": 122}
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens_of_image)
        )
    elif kind == "qwen2-vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 4}
        marks = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122}
        text = SMALL | {"rope_parameters": SECTIONS}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **marks))
    else:
        vision = VISION | {"model_type": "smolvlm_vision"}
        config = SmolVLMConfig(
            text_config=LlamaConfig(**SMALL), vision_config=vision, image_token_id=IMAGE, scale_factor=2
        )
        model = SmolVLMForConditionalGeneration(config)
    model.generation_config = GenerationConfig()
    return model.eval()


def prompt(length: int = 100) -> torch.Tensor:
    """Text of which no token stands for an image."""
    return tokens(1, length).clamp(min=3, max=100)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2-vl", "smolvlm"])
@torch.no_grad()
def test_text_is_read_as_by_the_full_cache(kind):
    model, written = seeing(kind), []
    ids, mask = left_padded(prompt(60).repeat(2, 1), [0, 21])
    full = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
    with lococo.attach(model, "mass-merge", num_slots=80, chunk_size=16) as slots:
        logits = model(ids, attention_mask=mask, past_key_values=slots.new_cache()).logits
        written.append(model.generate(ids, attention_mask=mask, past_key_values=slots.new_cache(), max_new_tokens=9))
    torch.testing.assert_close(logits[mask.bool()], full[mask.bool()], atol=1e-4, rtol=0)
    written.append(model.generate(ids, attention_mask=mask, max_new_tokens=9))
    assert torch.equal(*written)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2-vl", "smolvlm"])
@torch.no_grad()
def test_how_a_text_is_cut_into_calls_does_not_matter(kind):
    model, ids = seeing(kind), prompt()
    with lococo.attach(model, "h2o", num_slots=24, chunk_size=16) as slots:
        at_once = model(ids, past_key_values=slots.new_cache()).logits
        cache = slots.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split(23, 1)]
    assert cache.slot_layers[0].held == [24]
    torch.testing.assert_close(torch.cat(parts, 1), at_once, atol=2e-4, rtol=0)


def test_patches_of_an_image_are_compressed_like_tokens():
    model, ids = seeing("smolvlm"), prompt()
    ids[:, 10:14] = IMAGE
    image = torch.randn(2, 1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": each} for each in image]
    full, other = (model.generate(**each, max_new_tokens=12, do_sample=False) for each in shown)
    assert full.tolist() != other.tolist()
    with lococo.attach(model, "mass-merge", num_slots=100, chunk_size=16) as slots:
        inside = model.generate(**shown[0], past_key_values=slots.new_cache(), max_new_tokens=12, do_sample=False)
    assert inside.tolist() == full.tolist()
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots, torch.no_grad():
        cache = slots.new_cache()
        model(**shown[0], past_key_values=cache)
    kept = cache.slot_layers[0].token_index[0, 0, :40]
    assert ((kept >= 10) & (kept < 14)).any()


@torch.no_grad()
def test_patches_that_see_each_other_are_refused():
    model, ids = seeing("gemma3"), prompt()
    ids[:, 10:14] = IMAGE
    shown = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}
    with (
        lococo.attach(model, "h2o", num_slots=24, chunk_size=16) as slots,
        pytest.raises(UnsupportedModelError, match=r"patches of an image see each other .* text alone"),
    ):
        model(**shown, token_type_ids=(ids == IMAGE).long(), past_key_values=slots.new_cache())


@torch.no_grad()
def test_positions_of_several_dimensions_are_refused():
    model, ids = seeing("qwen2-vl"), prompt()
    places = torch.arange(100).repeat(3, 1, 1)
    places[1, 0, 10:] += 1
    with (
        lococo.attach(model, "h2o", num_slots=24, chunk_size=16) as slots,
        pytest.raises(UnsupportedModelError, match="more than one dimension"),
    ):
        model(ids, position_ids=places, past_key_values=slots.new_cache())


def test_nothing_is_watched_afterwards():
    model = seeing("gemma3")
    with lococo.attach(model, "h2o", num_slots=24, chunk_size=16):
        assert model.model._forward_pre_hooks
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks
