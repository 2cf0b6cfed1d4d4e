"""Forgetting the last tokens: assisted decoding gives what plain decoding gives, across compressions."""

import pytest
import torch
from families import heads_for, left_padded, tiny, tokens
from transformers import LlamaForCausalLM

import lococo
from lococo.errors import ArgumentError, LococoError
from lococo.past import RECALLED

COMPRESSORS = ["mass-merge", "h2o", "tova", "lococo-paper"]


def repeating(seed: int = 0) -> torch.Tensor:
    """A prompt whose end occurs earlier in it, so that there is something to look up."""
    sentence = tokens(1, 30, seed=seed)
    return torch.cat([sentence, sentence, sentence[:, :20]], 1)


def assistant(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with some noise: it guesses right often and wrong often."""
    made = LlamaForCausalLM(model.config).eval()
    made.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.layers.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    made.generation_config.update(num_assistant_tokens=20, num_assistant_tokens_schedule="constant")
    made.generation_config.assistant_confidence_threshold = 0.0
    return made


def decode(model, slots, **how):
    """Decode 90 tokens greedily: the ids, the cache, and how many columns each call had."""
    cache, calls = slots.new_cache(), []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = model.generate(repeating(), past_key_values=cache, max_new_tokens=90, do_sample=False, **how)
    hook.remove()
    return output, cache, calls


# One compression happens after 56 tokens, and one after every further 16: prompt and answer have eight.
@pytest.mark.parametrize(
    ("family", "compressor"),
    [
        *(("llama", name) for name in (*COMPRESSORS, "memory")),
        *(("gemma3", "h2o"), ("gpt2", "mass-merge"), ("gpt-oss", "h2o"), ("lfm2", "h2o")),
    ],
)
def test_prompt_lookup_decodes_what_plain_decoding_does(family, compressor):
    model = tiny(family)
    compressor = heads_for(model, scale=0.1, memory=0.5) if compressor == "memory" else compressor
    with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
        plain, plain_cache, _ = decode(model, slots)
        looked_up, cache, calls = decode(model, slots, prompt_lookup_num_tokens=24)
    assert looked_up.tolist() == plain.tolist()
    assert max(calls[1:]) > 16  # more tokens are guessed at a time than fit between two compressions
    assert sum(calls) > 80 + 89 > len(calls)  # some were forgotten
    assert cache.rows.tokens == plain_cache.rows.tokens == [169]
    assert vars(cache.rows) == vars(plain_cache.rows)
    for one, other in zip(cache.slot_layers, plain_cache.slot_layers, strict=True):
        filled = one.filled[0]
        assert other.filled == [filled]
        for name in ("keys", "values", "positions", "log_mass", "mass", "remembered"):
            if getattr(one, name) is not None:
                a, b = (getattr(layer, name)[:, :, :filled] for layer in (one, other))
                torch.testing.assert_close(a, b, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("compressor", ["mass-merge", "h2o"])
@torch.no_grad()
def test_an_assistant_decodes_what_plain_decoding_does(compressor):
    model = tiny()
    with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
        plain, _, _ = decode(model, slots)
        assisted, cache, calls = decode(model, slots, assistant_model=assistant(model))
    assert assisted.tolist() == plain.tolist()
    assert cache.rows.tokens == [169]
    assert len(calls) < 85  # some guesses were right
    assert sum(calls) > 80 + 89  # some were wrong


@torch.no_grad()
def test_packed_positions_are_moved_back_and_forth(monkeypatch):
    model = tiny()
    monkeypatch.setattr(model.config, "max_position_embeddings", 100)
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        plain, plain_cache, _ = decode(model, slots)
        looked_up, cache, _ = decode(model, slots, prompt_lookup_num_tokens=24)
    assert looked_up.tolist() == plain.tolist()
    assert cache.rows.shifted == plain_cache.rows.shifted != [0]


@pytest.mark.parametrize(
    ("family", "compressor", "pads"),
    [
        *(("llama", name, [0, 13, 60]) for name in COMPRESSORS),
        ("gemma3", "h2o", [0]),
        ("gemma3", "mass-merge", [0, 20]),
        ("gpt-oss", "h2o", [0, 20]),  # sinks take a part of the mass that is observed again
        ("lfm2", "h2o", [0, 40]),
    ],
)
@pytest.mark.parametrize("gone", [1, 16, 39])
@torch.no_grad()
def test_what_is_forgotten_leaves_no_trace(family, compressor, pads, gone):
    model = tiny(family)
    ids, mask = left_padded(tokens(len(pads), 150), pads)
    wrong = tokens(len(pads), 40, seed=7)
    more = torch.ones_like(wrong)
    with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
        cache, undisturbed = slots.new_cache(), slots.new_cache()
        cache.activate_past_recording()
        for one in (cache, undisturbed):
            model(ids[:, :110], attention_mask=mask[:, :110], past_key_values=one)
        cache.crop(0)
        guessed = torch.cat([ids[:, 110 : 150 - gone], wrong[:, :gone]], 1)
        model(guessed, attention_mask=mask, past_key_values=cache)
        cache.crop(-gone)
        model(ids[:, 110 : 150 - gone], attention_mask=mask[:, : 150 - gone], past_key_values=undisturbed)
        assert vars(cache.rows) == vars(undisturbed.rows)
        rest = torch.cat([ids[:, 150 - gone :], wrong], 1)
        masks = torch.cat([mask, more], 1)
        after, expected = (
            model(rest, attention_mask=masks, past_key_values=one).logits for one in (cache, undisturbed)
        )
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_copies_are_few_and_go_when_it_is_told_what_stays():
    model = tiny()
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        cache.activate_past_recording()
        model(tokens(1, 900), past_key_values=cache)
        lengths = [step.chunk.length for step in cache.past.steps]
        assert sum(lengths) >= RECALLED > sum(lengths[1:])
        with pytest.raises(LococoError, match=r"256 at most: 300 were to go, .* guess fewer tokens"):
            cache.crop(-300)
        cache.crop(-256)
        assert cache.seen == 900 - 256
        assert not cache.past.steps


@torch.no_grad()
def test_misuse_is_refused():
    model = tiny()
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(tokens(2, 20), past_key_values=cache)
        cache.crop(0)
        with pytest.raises(LococoError, match=r"cannot forget .* call activate_past_recording\(\) before"):
            cache.crop(-1)
        with pytest.raises(ArgumentError, match="negative number of tokens to forget, got 3"):
            cache.crop(3)
        cache.activate_past_recording()
        model(tokens(2, 5), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(LococoError, match="1 were to go, 0 are at hand"):
            cache.crop(-1)


@torch.no_grad()
def test_a_recurrent_state_forgets_whole_chunks_or_nothing():
    model, ids = tiny("granite-hybrid"), tokens(1, 30)
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        cache, undisturbed = slots.new_cache(), slots.new_cache()
        cache.activate_past_recording()
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(LococoError, match=r"recurrent state cannot forget a part .* decode without"):
            cache.crop(-3)
        cache.crop(0)
        model(tokens(1, 5, seed=1), past_key_values=cache)
        cache.crop(-5)
        after = model(ids[:, 20:], past_key_values=cache).logits
        expected = model(ids, past_key_values=undisturbed).logits[:, 20:]
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_interrupted_chunk_is_not_taken_down():
    model, ids = tiny(), tokens(1, 100)

    def interrupt(module, args):
        raise KeyboardInterrupt

    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
        cache, undisturbed = slots.new_cache(), slots.new_cache()
        cache.activate_past_recording()
        model(ids[:, :60], past_key_values=cache)
        hook = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 60:64], past_key_values=cache)
        hook.remove()
        cache.crop(-10)
        model(ids[:, :50], past_key_values=undisturbed)
        after, expected = (model(ids[:, 50:], past_key_values=one).logits for one in (cache, undisturbed))
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)
