import contextlib
import copy
from functools import cache

import pytest
import torch
from families import SMALL, VOCABULARY, heads_for, tiny, tokens
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    SuppressTokensLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

import lococo
from lococo.attachment import window_of
from lococo.compressors import Drop, Selection, SelectMerge
from lococo.compressors.learned import LearnedHeads
from lococo.compressors.selections import recency
from lococo.errors import ArgumentError, LococoError, UnsupportedModelError


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_the_model_is_left_as_it_was_found(attention):
    model = copy.deepcopy(tiny("llama", attention))
    ids = tokens(1, 50)
    before, state = model(ids).logits, {key: value.clone() for key, value in model.state_dict().items()}
    attributes = set(model.base_model.__dict__)
    with (
        contextlib.suppress(KeyboardInterrupt),
        lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots,
    ):
        model(ids, past_key_values=slots.new_cache())
        raise KeyboardInterrupt
    assert model.config._attn_implementation == attention
    assert set(model.base_model.__dict__) == attributes
    assert "forward" not in model.base_model.__dict__
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, before)
    assert not model.base_model._forward_hooks
    assert not model.base_model._forward_pre_hooks


@torch.no_grad()
def test_other_caches_run_as_before_while_attached():
    model, ids = tiny(), tokens(2, 50)
    cache = DynamicCache(config=model.config)
    expected = model(ids, past_key_values=cache).logits
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16):
        assert torch.equal(model(ids, past_key_values=DynamicCache(config=model.config)).logits, expected)
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_full_is_transformers_own_cache():
    with lococo.attach(tiny(), "full") as slots:
        assert type(slots.new_cache()) is DynamicCache


@torch.no_grad()
def test_two_models_with_two_compressors_in_one_process():
    first, second = tiny("llama"), tiny("glm4")
    ids = tokens(1, 120)
    alone = []
    for model, name in ((first, "h2o"), (second, "mass-merge")):
        with lococo.attach(model, name, num_slots=40, chunk_size=16) as slots:
            alone.append(model(ids, past_key_values=slots.new_cache()).logits)
    with (
        lococo.attach(first, "h2o", num_slots=40, chunk_size=16) as a,
        lococo.attach(second, "mass-merge", num_slots=40, chunk_size=16) as b,
    ):
        assert torch.equal(second(ids, past_key_values=b.new_cache()).logits, alone[1])
        assert torch.equal(first(ids, past_key_values=a.new_cache()).logits, alone[0])


def test_attaching_twice_is_refused():
    model = tiny()
    with lococo.attach(model, "h2o"), pytest.raises(LococoError, match="attached already"), lococo.attach(model, "h2o"):
        pass
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_compressor_of_ones_own():
    class Latest:
        name = "latest"
        observes = frozenset()

        def min_slots(self):
            return 1

        def compress(self, entries, num_slots, layer_idx):
            index = torch.arange(len(entries) - num_slots, len(entries))
            return entries.take(index.expand(*entries.positions.shape[:2], -1))

    model, ids = tiny(), tokens(1, 120)
    with lococo.attach(model, Latest(), num_slots=40, chunk_size=16) as slots:
        mine = model(ids, past_key_values=slots.new_cache()).logits
    with lococo.attach(model, SelectMerge("latest", Selection(recency), Drop()), num_slots=40, chunk_size=16) as slots:
        theirs = model(ids, past_key_values=slots.new_cache()).logits
    assert torch.equal(mine, theirs)


@torch.no_grad()
def test_bare_decoders_can_be_attached_too():
    torch.manual_seed(0)
    decoder = LlamaModel(LlamaConfig(**SMALL)).eval()
    ids = tokens(1, 60)
    expected = decoder(ids).last_hidden_state
    with lococo.attach(decoder, "h2o", num_slots=60, chunk_size=16) as slots:
        output = decoder(ids, past_key_values=slots.new_cache(), output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-4, rtol=0)
    assert [layer.shape for layer in output.hidden_states] == [(1, 60, 48)] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots must be a whole number of at least 1, got 0"),
        ({"num_slots": 2.5}, "num_slots must be"),
        ({"chunk_size": -3}, "chunk_size must be a whole number of at least 1, got -3"),
        ({"positions": "absolute"}, "'original' or 'packed', got 'absolute'"),
        ({"slots_per_layer": [40, 40]}, "each of the 4 layers"),
        ({"num_slots": 1000, "chunk_size": 100}, "do not fit the model's window of 1024"),
        ({"compressor": "nothing"}, "unknown compressor 'nothing'"),
        ({"compressor": "snapkv", "num_slots": 32}, "needs at least 33 slots"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ArgumentError, match=message):
        lococo.attach(tiny(), **options)


def test_models_without_a_growing_cache_are_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        lococo.attach(mamba)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        lococo.attach(t5)
    sliding = MistralForCausalLM(MistralConfig(**SMALL | {"sliding_window": 16}))
    with pytest.raises(UnsupportedModelError, match="constant already"):
        lococo.attach(sliding)


def test_an_attached_model_cannot_be_copied():
    model = tiny()
    with lococo.attach(model, "h2o", num_slots=40), pytest.raises(LococoError, match="cannot be copied"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_gradient_checkpointing_is_refused():
    model = copy.deepcopy(tiny()).train()
    model.activation_checkpointing_enable()
    with (
        lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots,
        pytest.raises(ArgumentError, match="gradient_checkpointing_disable"),
    ):
        model(tokens(1, 20), past_key_values=slots.new_cache())


def test_a_cache_that_is_not_to_be_used_is_refused():
    with (
        lococo.attach(tiny(), "h2o", num_slots=40, chunk_size=16) as slots,
        pytest.raises(ArgumentError, match="a SlotCache came with use_cache=False"),
    ):
        tiny()(tokens(1, 20), past_key_values=slots.new_cache(), use_cache=False)


def test_an_empty_batch_is_refused():
    with (
        lococo.attach(tiny(), "h2o", num_slots=40, chunk_size=16) as slots,
        pytest.raises(ArgumentError, match="at least one row"),
    ):
        tiny()(tokens(1, 20)[:0], past_key_values=slots.new_cache())


def test_a_prompt_without_tokens_is_refused():
    model, none = tiny(), tokens(1, 0)
    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
        with pytest.raises(ArgumentError, match="at least one token"):
            model(none, past_key_values=slots.new_cache())
        with pytest.raises(ArgumentError, match="at least one token"):
            model.generate(none, past_key_values=slots.new_cache(), max_new_tokens=2)


@torch.no_grad()
def test_a_compiled_model_reads_what_it_reads_uncompiled():
    model, ids, written = copy.deepcopy(tiny()), tokens(1, 60), []
    for compiled in (False, True):
        if compiled:
            model.compile(backend="eager")
        with lococo.attach(model, "mass-merge", num_slots=24, chunk_size=16) as slots:
            cache = slots.new_cache()
            written.append(model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False))
    assert torch.equal(*written)


@pytest.mark.parametrize("family", ["llama", "gemma3n"])
@torch.no_grad()
def test_hidden_states_of_a_call_are_those_of_the_full_cache(family):
    model, ids = tiny(family), tokens(2, 60)
    found = []
    for compressor in ("full", "mass-merge"):
        with lococo.attach(model, compressor, num_slots=60, chunk_size=16) as slots:
            found.append(model(ids, past_key_values=slots.new_cache(), output_hidden_states=True).hidden_states)
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_inputs_per_layer_are_cut_with_their_columns():
    # Gemma 3n with an image hands them to the language model within, beside embeddings.
    model, ids, found = tiny("gemma3n").model, tokens(1, 60), []
    inputs = {"inputs_embeds": model.embed_tokens(ids), "per_layer_inputs": model.get_per_layer_inputs(ids)}
    with lococo.attach(model, "mass-merge", num_slots=60, chunk_size=16) as slots:
        for each in ({"input_ids": ids}, inputs):
            found.append(model(**each, past_key_values=slots.new_cache()).last_hidden_state)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
@torch.no_grad()
def test_experts_are_balanced_over_the_whole_call(family):
    model, ids = tiny(family), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    found = []
    for compressor in ("full", "mass-merge"):
        with lococo.attach(model, compressor, num_slots=60, chunk_size=16) as slots:
            found.append(model(ids, attention_mask=mask, past_key_values=slots.new_cache(), output_router_logits=True))
    full, read = found
    for here, there in zip(full.router_logits, read.router_logits, strict=True):
        torch.testing.assert_close(here[mask.flatten() > 0], there[mask.flatten() > 0], atol=1e-3, rtol=1e-3)
    assert abs(float(full.aux_loss) - float(read.aux_loss)) < 1e-3


def test_longrope_is_read_within_its_original_window():
    config = LlamaConfig(
        **SMALL
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 6,
                "long_factor": [4.0] * 6,
                "original_max_position_embeddings": 64,
                "factor": 16.0,
            }
        }
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    assert window_of(model) == 64
    ids = tokens(1, 200)
    with torch.no_grad(), lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        at_once = model(ids, past_key_values=slots.new_cache()).last_hidden_state
        cache = slots.new_cache()
        parts = [model(part, past_key_values=cache).last_hidden_state for part in ids.split(37, 1)]
        assert max(cache.rows.next_position) <= 64
    torch.testing.assert_close(torch.cat(parts, 1), at_once, atol=2e-4, rtol=0)


def test_the_fingerprint_tells_apart_whatever_reads_differently(monkeypatch):
    def made(compressor="mass-merge", model=None, **options):
        return lococo.attach(model or tiny(), compressor, **{"num_slots": 40, "chunk_size": 16} | options).fingerprint()

    heads = heads_for(tiny())
    seen = [made(), made("h2o"), made("full"), made(num_slots=41), made(chunk_size=17), made(positions="original")]
    seen += [made(slots_per_layer=[39, 41, 40, 40]), made(model=tiny("qwen2")), made(heads)]
    with torch.no_grad():
        heads.norms.delta += 0.01
    seen.append(made(heads))
    longer = copy.deepcopy(tiny())
    longer.config.max_position_embeddings = 2048
    seen += [made(model=longer), made(model=copy.deepcopy(tiny()).to(torch.bfloat16))]
    with monkeypatch.context() as changed:
        changed.setattr(LearnedHeads, "revision", LearnedHeads.revision + 1)
        seen.append(made(heads))
        assert made() == seen[0]
    assert len(set(seen)) == len(seen)
    assert made() == seen[0]


@cache
def seeing() -> LlavaForConditionalGeneration:
    """A tiny Llava: a Llama that reads 16 patches of an image in place of 16 tokens 127."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4}
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**SMALL),
        image_token_index=127,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig()
    return model


def shown(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt of 120 tokens with an image at its beginning."""
    ids = tokens(1, 120).clamp(max=126)
    ids[:, 10:26] = 127
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_enough_slots_see_what_the_full_cache_sees():
    model, (image, other) = seeing(), torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    full, of_other = (model.generate(**shown(each), max_new_tokens=12, do_sample=False) for each in (image, other))
    assert full.tolist() != of_other.tolist()
    with lococo.attach(model, "mass-merge", num_slots=120, chunk_size=16) as slots:
        cache = slots.new_cache()
        inside = model.generate(**shown(image), past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert inside.tolist() == full.tolist()
    assert cache.rows.tokens == [131]
    assert slots.decoder is model.model.language_model
    assert "forward" not in vars(model.model.language_model)


@torch.no_grad()
def test_patches_of_an_image_are_entries_that_are_compressed():
    model, image = seeing(), torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = []
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        for pixels in (image, -image):
            cache = slots.new_cache()
            logits.append(model(**shown(pixels), past_key_values=cache).logits)
            assert cache.slot_layers[0].held == [40]
    kept = cache.slot_layers[0].token_index[0, 0, :40]
    assert ((kept >= 10) & (kept < 26)).any()
    # Tokens before the image cannot tell; those after the compressions still see it in the slots.
    differ = (logits[0] - logits[1]).abs().amax(-1)[0]
    assert (differ[:10] < 1e-4).all()
    assert (differ[100:] > 1e-3).all()


def test_generate_reads_embeddings_as_it_reads_ids():
    model, ids = tiny(), tokens(1, 100)
    outputs = []
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        for prompt in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids).detach()}):
            cache = slots.new_cache()
            outputs.append(model.generate(**prompt, past_key_values=cache, max_new_tokens=30, do_sample=False)[:, -30:])
            assert cache.rows.tokens == [129]
    assert torch.equal(*outputs)


def test_decoding_may_be_constrained():
    model, ids = tiny(), tokens(2, 100)
    odd = list(range(1, VOCABULARY, 2))
    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
        free, bound, processed = (
            model.generate(ids, past_key_values=slots.new_cache(), max_new_tokens=30, do_sample=False, **how)[:, 100:]
            for how in (
                {},
                {"prefix_allowed_tokens_fn": lambda row, so_far: odd},
                {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor(range(0, VOCABULARY, 2))])},
            )
        )
        # Each token is the likeliest of those allowed, given what was read.
        logits = model(torch.cat([ids, bound], 1), past_key_values=slots.new_cache()).logits[:, 99:-1, 1::2]
    assert (free % 2 == 0).any()
    assert (bound % 2 == 1).all()
    assert bound.tolist() == processed.tolist()
    assert (2 * logits.argmax(-1) + 1).tolist() == bound.tolist()


@pytest.mark.parametrize("how", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}])
def test_searches_that_transformers_left_to_the_hub_are_refused_by_it(how):
    model = tiny()
    with (
        lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots,
        pytest.raises(ValueError, match="trust_remote_code=True"),
    ):
        model.generate(tokens(1, 60), past_key_values=slots.new_cache(), max_new_tokens=5, do_sample=False, **how)
