"""The contracts that every family of models keeps, family by property; see `families.EVERY`."""

import copy
from dataclasses import replace

import pytest
import torch
from families import (
    FAMILIES,
    MARKED,
    README,
    REFUSED,
    heads_for,
    left_padded,
    tiny,
    tokenizer,
    tokens,
    with_table,
)
from transformers import DynamicCache

import lococo
from lococo import entries as entries_of
from lococo.attachment import slot_layer_indices
from lococo.compressors import of_heads
from lococo.errors import UnsupportedModelError

LATENT = ("deepseek-v2", "deepseek-v3")
HYBRID = ("qwen3-next", "granite-hybrid", "falcon-h1", "lfm2")

families = pytest.mark.parametrize("family", FAMILIES)


def full_logits(model, ids, mask=None):
    position_ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    return model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 100])
@families
@torch.no_grad()
def test_enough_slots_equal_the_full_cache(family, chunk_size):
    model = tiny(family)
    length = 60 if chunk_size > 1 else 24
    ids, mask = left_padded(tokens(3, length), [0, 11, length - 20])
    expected = full_logits(model, ids, mask)
    for positions in ("original", "packed"):
        with lococo.attach(model, "mass-merge", num_slots=60, chunk_size=chunk_size, positions=positions) as slots:
            logits = model(ids, attention_mask=mask, past_key_values=slots.new_cache()).logits
        real = mask.bool()
        torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("compressor", ["mass-merge", "h2o"])
@families
@torch.no_grad()
def test_memory_stays_what_it_was_through_compressions(family, compressor):
    model, sizes = tiny(family), set()
    with lococo.attach(model, compressor, num_slots=24, chunk_size=16) as slots:
        cache = slots.new_cache()
        for part in tokens(1, 120).split(40, 1):
            assert model(part, past_key_values=cache).logits.isfinite().all()
            sizes.add((cache.nbytes, cache.kv_nbytes if family not in HYBRID else 0))
    # 24 + 16 tokens fill the buffer, every further 16 fill it again.
    assert [layer.held for layer in cache.slot_layers] == [[24]] * len(slots.layers)
    assert cache.rows.tokens[0] == 120
    slides = any(not hasattr(layer, "held") and getattr(layer, "keys", None) is not None for layer in cache.layers)
    assert len({size for size, _ in sizes}) == 1
    assert slides or len(sizes) == 1


@families
@torch.no_grad()
def test_keys_rotate_back_to_what_they_were_without_a_position(family):
    # The same tokens 200 positions further on have the same keys, once both are rotated back.
    model, ids, found = tiny(family), tokens(1, 20), []
    for first in (0, 200):
        with lococo.attach(model, "look-ahead", num_slots=24, chunk_size=32) as slots:
            cache = slots.new_cache()
            model(ids, position_ids=torch.arange(first, first + 20)[None], past_key_values=cache)
        found.append([layer.entries([0], 20).unrotated_keys for layer in cache.slot_layers])
    if family == "gpt2":  # learns its positions, so the keys themselves differ
        assert not torch.allclose(found[0][0], found[1][0], atol=1e-3)
        return
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, atol=2e-4, rtol=0)


@families
@torch.no_grad()
def test_a_left_padded_row_reads_as_it_does_alone(family):
    model = tiny(family)
    ids, mask = left_padded(tokens(3, 140), [0, 37, 57])
    with lococo.attach(model, "mass-merge", num_slots=24, chunk_size=16) as slots:
        cache = slots.new_cache()
        together = model(ids, attention_mask=mask, past_key_values=cache).logits
        assert min((read - 24 - 1) // 16 for read in cache.rows.tokens) >= 3
        for row, pad in ((1, 37), (2, 57)):
            alone = model(ids[row : row + 1, pad:], past_key_values=slots.new_cache()).logits[0]
            torch.testing.assert_close(together[row, pad:], alone, atol=2e-4, rtol=0)


@families
@torch.no_grad()
def test_beams_are_those_of_the_full_cache(family):
    model, outputs = tiny(family), []
    ids, mask = left_padded(tokens(2, 20), [0, 5])
    for compressor in ("full", "mass-merge"):
        with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
            how = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 2, "do_sample": False}
            outputs.append(model.generate(ids, past_key_values=slots.new_cache(), **how))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("compressor", ["mass-merge", "h2o"])
@families
@torch.no_grad()
def test_a_saved_context_goes_on_as_if_never_saved(family, compressor, tmp_path):
    model, ids, more = tiny(family), tokens(1, 80), tokens(1, 30, seed=2)
    path = tmp_path / "a.safetensors"
    with lococo.attach(model, compressor, num_slots=24, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(ids, past_key_values=cache)
        lococo.save_context(path, cache, model=model, tokenizer=tokenizer(), token_ids=ids[0].tolist())
        again = model(more, past_key_values=lococo.load_context(path, slots, tokenizer()).cache).logits
        assert torch.equal(again, model(more, past_key_values=cache).logits)


@families
@torch.no_grad()
def test_half_precision_reads_the_same_text_and_scores_in_float32(family, monkeypatch):
    half, ids, seen = copy.deepcopy(tiny(family)).to(torch.bfloat16), tokens(1, 60), []
    expected = full_logits(half, ids).float()

    def watched(*args, mass=entries_of.attention_mass, **kwargs):
        seen.append(mass(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(entries_of, "attention_mass", watched)
    with lococo.attach(half, "mass-merge", num_slots=24, chunk_size=16) as slots:
        cache = slots.new_cache()
        logits = half(ids, past_key_values=cache).logits
    assert logits.dtype == cache.slot_layers[0].keys.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert {mass.dtype for mass in seen} == {torch.float32}
    assert cache.slot_layers[0].log_mass.dtype == torch.float32
    # Nothing is compressed before token 40.
    similarity = torch.nn.functional.cosine_similarity(logits[0, :40].float(), expected[0, :40], -1)
    assert similarity.mean() > 0.98


@families
def test_a_step_of_training_lowers_the_loss(family):
    model, ids = copy.deepcopy(tiny(family)).requires_grad_(False), tokens(1, 100)
    heads = heads_for(model, scale=0.05, learned_scores=False).requires_grad_(True)
    compressor = of_heads(heads, "mine")

    def loss():
        with lococo.attach(model, compressor, num_slots=24, chunk_size=16) as slots:
            logits = model(ids[:, :-1], past_key_values=slots.new_cache()).logits
        return torch.nn.functional.cross_entropy(logits[0, 41:], ids[0, 42:])

    if family in LATENT:
        with pytest.raises(UnsupportedModelError, match="caches latents that both are made of"):
            loss()
        return
    before = loss()
    before.backward()
    gradients = [parameter.grad for parameter in heads.parameters()]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in gradients)
    length = torch.stack([grad.square().sum() for grad in gradients]).sum().sqrt()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter -= 5e-4 / length * parameter.grad
        assert loss() < before


@families
@torch.no_grad()
def test_a_model_is_left_as_it_was_found(family):
    model, ids = tiny(family), tokens(1, 30)
    before, attributes = model(ids).logits, set(vars(model.get_decoder()))
    with lococo.attach(model, "mass-merge", num_slots=24, chunk_size=16) as slots:
        model(ids, past_key_values=slots.new_cache())
    assert set(vars(model.get_decoder())) == attributes
    assert model.config._attn_implementation == FAMILIES[family].attention
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_read_in_slots_is_refused_with_the_reason(family):
    with pytest.raises(UnsupportedModelError, match=REFUSED[family].refused):
        lococo.attach(tiny(family), "mass-merge", num_slots=24, chunk_size=16)


@torch.no_grad()
def test_a_state_that_forgets_is_read_token_by_token():
    model = tiny("jamba")
    ids, mask = left_padded(tokens(2, 40), [0, 11])
    expected = full_logits(model, ids, mask)
    with lococo.attach(model, "h2o", num_slots=40, chunk_size=1) as slots:
        logits = model(ids, attention_mask=mask, past_key_values=slots.new_cache()).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["granite-hybrid", "lfm2", "falcon-h1"])
@torch.no_grad()
def test_padding_in_a_chunk_of_one_column_leaves_no_trace_in_a_state(family):
    # The first two rows are full one column apart, so that the chunk between holds one column, padding in the third.
    model = tiny(family)
    ids, mask = left_padded(tokens(3, 90), [0, 1, 42])
    with lococo.attach(model, "streaming-llm", num_slots=24, chunk_size=16) as slots:
        together = model(ids, attention_mask=mask, past_key_values=slots.new_cache()).logits[2, 42:]
        alone = model(ids[2:, 42:], past_key_values=slots.new_cache()).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_rows_of_a_hybrid_are_selected_and_repeated():
    for family in HYBRID:
        model = tiny(family)
        ids, more = tokens(3, 60), tokens(1, 20, seed=3)
        with lococo.attach(model, "mass-merge", num_slots=24, chunk_size=16) as slots:
            cache = slots.new_cache()
            model(ids, past_key_values=cache)
            other = lococo.cache.fork(cache)
            other.batch_select_indices(torch.tensor([2, 0]))
            other.batch_repeat_interleave(2)
            logits = model(more.expand(4, -1), past_key_values=other).logits
            expected = model(more.expand(3, -1), past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[[2, 2, 0, 0]], atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", LATENT)
@torch.no_grad()
def test_mass_over_latents_is_that_of_the_expanded_keys(family):
    # The queries, taken back through what expands latents, see in latents what they see in the expanded keys.
    model, ids, maps = tiny(family, "eager"), tokens(1, 20), []
    model = copy.deepcopy(model)
    with lococo.attach(model, "h2o", num_slots=24, chunk_size=32) as slots:
        cache = slots.new_cache()
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda module, args, output: maps.append(output[1]))
        model(ids, past_key_values=cache)
    for layer, map_ in zip(cache.slot_layers, maps, strict=True):
        torch.testing.assert_close(layer.mass[0, 0, :20], map_[0].sum((0, 1)), atol=1e-4, rtol=0)


@torch.no_grad()
def test_sinks_take_their_share_of_the_mass():
    model, ids, maps = tiny("gpt-oss"), tokens(1, 20), []
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(2.0)
    with lococo.attach(model, "h2o", num_slots=24, chunk_size=32) as slots:
        cache = slots.new_cache()
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda module, args, output: maps.append(output[1]))
        model(ids, past_key_values=cache)
    for layer in cache.slot_layers:
        map_ = maps[layer.layer_idx][0]
        assert map_.sum(-1).mean() < 0.95
        expected = map_.view(2, 2, 20, 20).sum((1, 2))
        torch.testing.assert_close(layer.mass[0, :, :20], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_layers_without_rope_are_left_unrotated():
    with lococo.attach(tiny("smollm3"), "look-ahead", num_slots=24, chunk_size=16) as slots:
        x = torch.randn(1, 2, 3, 12)
        turned = [slots.rotary.of_layer(i).rotate(x, torch.ones(1, 1, 3)) is not x for i in range(4)]
    assert turned == [True, False, True, True]


@torch.no_grad()
def test_layers_that_share_keys_attend_to_the_slots_of_the_layer_that_has_them():
    model = tiny("gemma3n")
    assert slot_layer_indices(model) == [1]
    with lococo.attach(model, "h2o", num_slots=24, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(tokens(1, 60), past_key_values=cache)
        layer = cache.slot_layers[0]
        assert cache.attended(3, layer.keys[:, :, :5]) is layer
        assert cache.attended(2, torch.zeros(1)) is None


def test_the_readme_has_the_table_of_this_matrix():
    readme = README.read_text("utf-8")
    assert MARKED.search(readme)
    assert with_table(readme) == readme


def test_a_wrong_table_is_noticed(monkeypatch):
    changed = {"llama": replace(FAMILIES["llama"], models="another")}
    monkeypatch.setattr("families.EVERY", changed)
    readme = README.read_text("utf-8")
    assert with_table(readme) != readme
