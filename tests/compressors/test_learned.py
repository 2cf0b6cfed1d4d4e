import math

import pytest
import torch
from families import heads_for, left_padded, tiny, tokens

import lococo
from lococo.compressors.heads import load_heads, save_heads
from lococo.compressors.selections import RECENT
from lococo.errors import ArgumentError, FileFormatError
from lococo.facts import ModelFacts


def logits_of(model, compressor, ids, mask=None, **options):
    with lococo.attach(model, compressor, **{"num_slots": 40, "chunk_size": 16, **options}) as slots:
        return model(ids, attention_mask=mask, past_key_values=slots.new_cache()).logits


@torch.no_grad()
def test_untrained_heads_are_mass_merge():
    model, ids = tiny(), tokens(2, 150)
    assert torch.equal(logits_of(model, heads_for(model), ids), logits_of(model, "mass-merge", ids))


@pytest.mark.parametrize("option", ["learned_scores", "learned_merge"])
@torch.no_grad()
def test_each_part_changes_the_outcome_and_can_be_switched_off(option):
    model, ids = tiny(), tokens(1, 150)
    outcomes = [logits_of(model, heads_for(model, scale=0.3, **{option: on}), ids) for on in (True, False)]
    assert not torch.allclose(*outcomes, atol=1e-3)


@pytest.mark.parametrize("gain", [-0.2, 0.2])
@torch.no_grad()
def test_a_gain_is_given_once_however_long_the_text(gain):
    model = tiny()

    def log_mass(compressor, tokens_read):
        with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
            cache = slots.new_cache()
            lococo.prefill(model, tokens(1, tokens_read), cache)
        return torch.cat([layer.log_mass[0, :, : layer.held[0]].flatten() for layer in cache.slot_layers])

    heads = heads_for(model)
    for net in heads.mergers.values():
        net.out.bias[1] = gain
    for tokens_read in (60, 600):
        least = log_mass(heads, tokens_read).min().item()
        assert least == pytest.approx(log_mass("mass-merge", tokens_read).min().item() + gain, abs=1e-6)


@torch.no_grad()
def test_scorers_decide_about_a_share_of_the_slots_alone():
    model, num_slots, seen = tiny(), 300, {}
    heads = heads_for(model)
    for net in heads.scorers.values():
        net.out.weight.normal_(std=30.0)
    heads.on_compress = lambda layer_idx, entries, kept: seen.setdefault(layer_idx, entries) and None
    with lococo.attach(model, heads, num_slots=num_slots, chunk_size=64) as slots:
        cache = slots.new_cache()
        lococo.prefill(model, tokens(1, 370), cache)
    for layer in cache.slot_layers:
        mass = seen[layer.layer_idx].future_mass[0]
        mass[:, -RECENT:] = torch.inf
        for head, kept in zip(mass, layer.token_index[0, :, :num_slots], strict=True):
            foreseen = set(head.topk(num_slots).indices.tolist())
            certain = set(head.topk(num_slots - num_slots // 4).indices.tolist())
            assert certain < set(kept.tolist())
            assert len(foreseen - set(kept.tolist())) > 5


@torch.no_grad()
def test_slots_are_chosen_by_what_was_wanted_before_as_well():
    model, memory, remembered, expected, differ = tiny(), 0.6, {}, {}, []
    heads = heads_for(model, memory=memory, learned_scores=False)

    def best(row, worth, count):
        return sorted([*sorted(row[:-RECENT], key=worth.get)[RECENT - count :], *row[-RECENT:]])

    def look(layer_idx, entries, count):
        for head, row in enumerate(entries.token_index[0].tolist()):
            place = layer_idx, head
            if place in expected:
                assert row[:count] == expected[place]
            ahead = entries.future_mass[0, head].clamp(min=1e-9)
            now = dict(zip(row, (ahead / ahead.sum()).tolist(), strict=True))
            before = remembered.get(place, {})
            remembered[place] = {
                token: memory * before[token] + (1 - memory) * share if token in before else share
                for token, share in now.items()
            }
            expected[place] = best(row, remembered[place], count)
            remembered[place] = {token: remembered[place][token] for token in expected[place]}
            differ.append(expected[place] != best(row, now, count))

    heads.on_compress = look
    with lococo.attach(model, heads, num_slots=40, chunk_size=16) as slots:
        lococo.prefill(model, tokens(1, 200), slots.new_cache())
    assert len(expected) == 4 * model.config.num_key_value_heads
    assert sum(differ) > len(differ) / 4


def test_no_layer_is_given_more_than_the_window_holds():
    model = tiny()
    heads = heads_for(model, budgets={40: [1, 1, 1, 60]})
    assert heads.slots_per_layer(40)[3] > 100
    window = model.config.max_position_embeddings
    chunk_size = window - 80
    slots = lococo.attach(model, heads, num_slots=40, chunk_size=chunk_size).slots_per_layer
    assert max(slots) == 80
    assert sum(slots) == 4 * 40
    with pytest.raises(ArgumentError, match=f"^81 slots and a chunk of {chunk_size} do not fit the model's window"):
        lococo.attach(model, heads, num_slots=81, chunk_size=chunk_size)


def test_heads_without_memory_are_what_they_were_before_there_was_any():
    model = tiny()
    assert "memory" not in heads_for(model).settings
    heads = heads_for(model, memory=0.5)
    assert type(heads).of_settings(heads.settings).form.memory == 0.5
    with pytest.raises(ValueError, match=r"expected memory from 0 to less than 1, got 1\.5"):
        type(heads).of_settings(heads.settings | {"memory": 1.5})


@torch.no_grad()
def test_a_first_compression_remembers_nothing_and_heads_without_memory_never_do():
    model, ids = tiny(), tokens(2, 150)
    without, within = (heads_for(model, scale=0.3, memory=memory) for memory in (0.0, 0.5))
    assert torch.equal(logits_of(model, without, ids[:, :72]), logits_of(model, within, ids[:, :72]))
    assert not torch.allclose(logits_of(model, without, ids), logits_of(model, within, ids), atol=1e-3)
    for heads in (without, within):
        with lococo.attach(model, heads, num_slots=40, chunk_size=16) as slots:
            cache = slots.new_cache()
            lococo.prefill(model, ids, cache)
        for layer in cache.slot_layers:
            assert (layer.remembered is None) == (heads is without)
            if heads is within:
                filled = layer.filled[0]
                assert (layer.remembered[:, :, :40] > 0).all()
                assert (layer.remembered[:, :, 40:filled] == 0).all()


@pytest.mark.parametrize("memory", [0.0, 0.5])
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(memory):
    model, pads = tiny(), [0, 13, 60]
    heads = heads_for(model, scale=0.1, memory=memory)
    ids, mask = left_padded(tokens(3, 190), pads)
    together = logits_of(model, heads, ids, mask)
    for row, pad in enumerate(pads):
        alone = logits_of(model, heads, ids[row : row + 1, pad:])
        torch.testing.assert_close(together[row, pad:], alone[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_text_that_fits_is_read_as_the_model_reads_it():
    model, ids = tiny(), tokens(2, 56)
    assert not torch.allclose(logits_of(model, heads_for(model, scale=0.3), tokens(2, 57)), model(tokens(2, 57)).logits)
    read = logits_of(model, heads_for(model, scale=0.3), ids)
    torch.testing.assert_close(read, model(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_norms_hold_for_rows_with_slots_alone_and_leave_no_trace():
    model = tiny()
    heads = heads_for(model)
    ids = tokens(1, 80)
    before = model(ids).logits
    plain = logits_of(model, heads, ids)
    heads.norms.delta += 0.2
    changed = logits_of(model, heads, ids)
    assert torch.equal(plain[:, :56], changed[:, :56])
    assert not torch.allclose(plain[:, 56:], changed[:, 56:], atol=1e-3)
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_the_norms_change_less_with_more_slots():
    model = tiny()
    heads, norm = heads_for(model), model.base_model.norm
    heads.norms.delta += 0.1
    states = torch.randn(1, 3, model.config.hidden_size)
    plain = norm(states)
    handles = heads.norms.install(model.base_model)
    with heads.norms.holding([True], 256):
        torch.testing.assert_close(norm(states), plain * 1.05)
    assert torch.equal(norm(states), plain)
    for handle in handles:
        handle.remove()


def test_budgets_are_interpolated_and_keep_the_total():
    heads = heads_for(tiny(), budgets={64: [1, 1, 1, 5], 256: [1, 1, 1, 1]})
    assert heads.slots_per_layer(256) == [256] * 4
    low, middle = heads.slots_per_layer(64), heads.slots_per_layer(128)
    assert sum(low) == 256
    assert sum(middle) == 512
    # At least 9 each and the rest by weight, 1 to 5, where the first ones get the halves; then 1 to the root of 5.
    assert low == [37, 37, 36, 146]
    assert middle[3] == 9 + int((512 - 4 * 9) * 5**0.5 / (3 + 5**0.5))
    with lococo.attach(tiny(), heads, num_slots=64, chunk_size=16) as slots:
        assert slots.new_cache().slots_per_layer == low


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_saved_heads_are_the_same_heads(tmp_path, dtype):
    model, ids = tiny(), tokens(1, 150)
    heads = heads_for(model, scale=0.1, budgets={64: [1, 2, 1, 1]})
    save_heads(heads, tmp_path, ModelFacts.of(model), dtype=dtype)
    expected, read = logits_of(model, heads, ids), logits_of(model, str(tmp_path), ids)
    torch.testing.assert_close(read, expected, atol=0 if dtype == torch.float32 else 0.05, rtol=0)
    _, loaded = load_heads(tmp_path, {0: 40, 1: 40, 2: 40, 3: 40}, 12)
    assert loaded.slots_per_layer(50) == heads.slots_per_layer(50)


def test_heads_of_another_model_are_refused(tmp_path):
    save_heads(heads_for(tiny()), tmp_path, ModelFacts.of(tiny()))
    with pytest.raises(FileFormatError, match="rope"):
        lococo.attach(tiny("llama-yarn"), str(tmp_path), num_slots=40)


def test_a_model_without_heads_of_its_own():
    with pytest.raises(ArgumentError, match=r"no heads for .* come with lococo; train them"):
        lococo.attach(tiny(), "lococo", num_slots=40)
    assert lococo.attach(tiny(), num_slots=40).compressor.name == "mass-merge"


@pytest.mark.parametrize("weights", [[1, 1, 1], [0, 0, 0, 0], [1, 1, 1, -3], [1, 1, 1, math.nan]])
def test_budgets_that_are_none_are_refused(tmp_path, weights):
    heads = heads_for(tiny(), budgets={64: weights})
    save_heads(heads, tmp_path, ModelFacts.of(tiny()))
    with pytest.raises(FileFormatError, match="expected 4 shares of 64 slots, not all 0"):
        lococo.attach(tiny(), str(tmp_path), num_slots=64, chunk_size=16)
