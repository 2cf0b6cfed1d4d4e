import copy

import pytest
import torch
from families import heads_for, left_padded, tiny, tokens
from transformers import DynamicCache

import lococo
from lococo.cache import fork, taken
from lococo.compressors import PAIRS, MassMerge, Selection, SelectMerge
from lococo.compressors.selections import recency
from lococo.errors import ArgumentError, LococoError, WindowError
from lococo.rows import PER_ROW
from lococo.slot_layer import SlotLayer

LEARNING_FREE = [*PAIRS, "h2o+mass-merge", "streaming-llm+mass-merge"]

# Learned heads that store with each slot what it was worth; without changes of norms, which rows without slots lack.
REMEMBERING = "lococo with memory"


def with_memory(model):
    heads = heads_for(model, scale=0.1, memory=0.5)
    heads.norms = None
    return heads


def full_logits(model, ids, mask=None):
    position_ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    return model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_both_attention_backends_equal_the_full_cache(attention):
    model = tiny("llama", attention)
    ids = tokens(2, 70)
    expected = full_logits(model, ids)
    with lococo.attach(model, "h2o", num_slots=70, chunk_size=16) as slots:
        logits = model(ids, past_key_values=slots.new_cache()).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("compressor", LEARNING_FREE)
@torch.no_grad()
def test_left_padded_row_gives_the_tokens_of_the_row_alone(compressor, positions, monkeypatch):
    model = tiny()
    if positions == "packed":  # a window that the text leaves, so that slots move
        monkeypatch.setattr(model.config, "max_position_embeddings", 96)
    ids, mask = left_padded(tokens(3, 150), [0, 13, 60])
    with lococo.attach(model, compressor, num_slots=40, chunk_size=16, positions=positions) as slots:
        cache = slots.new_cache()
        together = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False)
        # 40 + 16 tokens fill the buffer, every further 16 fill it again.
        assert min((tokens_read - 40 - 1) // 16 for tokens_read in cache.rows.tokens) >= 3
        for row, pad in enumerate([0, 13, 60]):
            alone = model.generate(
                ids[row : row + 1, pad:], past_key_values=slots.new_cache(), max_new_tokens=24, do_sample=False
            )
            assert alone[0, 150 - pad :].tolist() == together[row, 150:].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3", "glm4", "gpt2"])
@pytest.mark.parametrize("compressor", LEARNING_FREE)
@torch.no_grad()
def test_how_a_text_is_cut_into_calls_does_not_matter(compressor, family):
    model, ids = tiny(family), tokens(2, 170)
    with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
        at_once = model(ids, past_key_values=slots.new_cache()).logits
        cache = slots.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split([3, 80, 1, 1, 60, 25], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), at_once, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt-neox"])
@torch.no_grad()
def test_moving_positions_back_changes_nothing_that_rope_sees(family, monkeypatch):
    # With a window just large enough, no slot ever reaches position 0, where distances would be cut short.
    model, ids = tiny(family), tokens(1, 150)
    latest = SelectMerge("latest", Selection(recency), MassMerge())
    outputs = []
    for window in (1024, 150 - 16):
        monkeypatch.setattr(model.config, "max_position_embeddings", window)
        with lococo.attach(model, latest, num_slots=40, chunk_size=16) as slots:
            cache = slots.new_cache()
            outputs.append(model(ids, past_key_values=cache).logits)
            assert max(cache.rows.next_position) <= window
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=0)


@torch.no_grad()
def test_packed_positions_stay_inside_the_window(monkeypatch):
    model = tiny()
    monkeypatch.setattr(model.config, "max_position_embeddings", 64)
    seen = []
    forward = model.model.rotary_emb.forward
    monkeypatch.setattr(
        model.model.rotary_emb,
        "forward",
        lambda x, position_ids: (seen.append(int(position_ids.max())), forward(x, position_ids))[1],
    )
    with lococo.attach(model, "look-ahead", num_slots=32, chunk_size=16) as slots:
        cache = slots.new_cache()
        logits = model(tokens(1, 400), past_key_values=cache).logits
    assert max(seen) == 63
    assert logits.isfinite().all()
    positions = cache.slot_layers[0].positions[..., : cache.slot_layers[0].filled[0]]
    assert (positions.diff() > 0).all()


@torch.no_grad()
def test_a_text_that_leaves_the_window_ends_inside_it_and_keeps_its_order(monkeypatch):
    model = tiny()
    monkeypatch.setattr(model.config, "max_position_embeddings", 160)
    with lococo.attach(model, "h2o", num_slots=32, chunk_size=16) as slots:
        cache = slots.new_cache()
        read, ends = 0, []
        for part in tokens(1, 600).split(8, 1):
            model(part, past_key_values=cache)
            read += part.shape[1]
            ends.append((read, cache.rows.next_position[0]))
            for layer in cache.slot_layers:
                positions = layer.positions[..., : layer.filled[0]]
                assert (positions.diff() > 0).all()
                # What does not stand in the row of the oldest is as far away as it was.
                near = positions > 48
                told = layer.token_index[..., : layer.filled[0]]
                assert torch.equal((positions - cache.rows.next_position[0])[near], (told - read).float()[near])
    assert all(end == count for count, end in ends if count <= 160)
    assert all(104 < end <= 120 for count, end in ends if count > 160)


@torch.no_grad()
def test_original_positions_beyond_the_window_are_refused():
    model = tiny()
    with lococo.attach(model, "look-ahead", num_slots=32, chunk_size=16, positions="original") as slots:
        cache = slots.new_cache()
        with pytest.raises(WindowError, match=r"position 1025.*1024.*positions='packed'"):
            model(tokens(1, 1025), past_key_values=cache)
        assert cache.seen == 0
        model(tokens(1, 1024), past_key_values=cache)


@torch.no_grad()
def test_memory_is_constant_from_the_first_token_on():
    model = tiny()
    with lococo.attach(model, "mass-merge", num_slots=32, chunk_size=16) as slots:
        cache = slots.new_cache()
        sizes = set()
        for part in tokens(1, 900).split(50, 1):
            model(part, past_key_values=cache)
            sizes.add((cache.nbytes, cache.kv_nbytes))
    # keys and values: 4 layers, 2 heads, 32 + 16 entries of 12 floats
    assert {kv for _, kv in sizes} == {2 * 4 * 2 * 48 * 12 * 4}
    assert len(sizes) == 1


@torch.no_grad()
def test_layers_may_have_different_numbers_of_slots():
    model, ids = tiny(), tokens(2, 150)
    budgets = [20, 70, 33, 37]
    with lococo.attach(model, "look-ahead", slots_per_layer=budgets, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert cache.num_slots == 40
    fresh = cache.rows.fresh[0]
    assert [layer.held for layer in cache.slot_layers] == [[m, m] for m in budgets]
    assert [layer.filled[0] for layer in cache.slot_layers] == [m + fresh for m in budgets]
    # entries stay in temporal order, and the last ones are the last tokens
    for layer in cache.slot_layers:
        index = layer.token_index[0, 0, : layer.filled[0]]
        assert (index.diff() > 0).all()
        assert index[-fresh:].tolist() == list(range(151 - fresh, 151))


@pytest.mark.parametrize("budgets", [[20, 70, 33, 37], [70, 37, 33, 20]])
@pytest.mark.parametrize("pads", [[0], [0, 13, 60]])
@pytest.mark.parametrize("compressor", ["streaming-llm", "mass-merge"])
@torch.no_grad()
def test_layers_of_every_width_are_masked_alike(compressor, pads, budgets, monkeypatch):
    shared, widths = SlotLayer.shared_bias, []

    def checked(layer, query):
        bias = shared(layer, query)
        if bias is not None:
            widths.append(bias.shape[-1])
            hidden = torch.arange(widths[-1]) >= layer.visible()[..., None]
            expected = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[:, None]
            if layer.carries_mass:
                expected = expected + layer.log_mass[:, :, None, : widths[-1]]
            assert torch.equal(bias, expected)
        return bias

    monkeypatch.setattr(SlotLayer, "shared_bias", checked)
    ids, mask = left_padded(tokens(len(pads), 150), pads)
    model = tiny()
    with lococo.attach(model, compressor, slots_per_layer=budgets, chunk_size=16) as slots:
        model(ids, attention_mask=mask, past_key_values=slots.new_cache())
    assert len(set(widths)) > len(budgets)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8},
        {"num_beams": 3, "do_sample": False},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    ],
)
@torch.no_grad()
def test_generate_with_enough_slots_equals_the_full_cache(options):
    model = tiny()
    ids, mask = left_padded(tokens(2, 60), [0, 9])
    outputs = []
    for compressor in ("full", "mass-merge"):
        with lococo.attach(model, compressor, num_slots=120, chunk_size=16) as slots:
            torch.manual_seed(1)
            outputs.append(
                model.generate(
                    ids, attention_mask=mask, past_key_values=slots.new_cache(), max_new_tokens=20, **options
                )
            )
    assert torch.equal(*outputs)


@torch.no_grad()
def test_beam_search_with_compressions_follows_its_beams():
    model, ids = tiny(), tokens(1, 100)
    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
        best = model.generate(
            ids, past_key_values=slots.new_cache(), max_new_tokens=40, num_beams=3, do_sample=False, length_penalty=0.0
        )
        greedy = model.generate(ids, past_key_values=slots.new_cache(), max_new_tokens=40, do_sample=False)
        likelihoods = [lococo.score(model, output, slots.new_cache())[0, 99:].sum() for output in (best, greedy)]
    assert likelihoods[0] >= likelihoods[1] - 1e-3


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache():
    model, ids = tiny(), tokens(1, 100)
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        first = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
        longer = torch.cat([first, tokens(1, 30, seed=2)], 1)
        second = model.generate(longer, past_key_values=cache, max_new_tokens=10, do_sample=False)
        at_once = model.generate(longer, past_key_values=slots.new_cache(), max_new_tokens=10, do_sample=False)
    assert second.tolist() == at_once.tolist()


@torch.no_grad()
def test_rows_are_selected_and_repeated():
    model = tiny()
    ids, mask = left_padded(tokens(3, 100), [0, 20, 47])
    with lococo.attach(model, "h2o+mass-merge", num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        more = tokens(1, 50, seed=3)
        logits = model(more.expand(4, -1), past_key_values=cache).logits
        for row, (source, pad) in {0: (2, 47), 1: (2, 47), 2: (0, 0), 3: (0, 0)}.items():
            alone = slots.new_cache()
            model(ids[source : source + 1, pad:], past_key_values=alone)
            expected = model(more, past_key_values=alone).logits
            torch.testing.assert_close(logits[row : row + 1], expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_an_interrupted_chunk_leaves_the_cache_as_it_was(monkeypatch):
    model, ids = tiny(), tokens(1, 120)
    with lococo.attach(model, "h2o+mass-merge", num_slots=40, chunk_size=16) as slots:
        cache, undisturbed = slots.new_cache(), slots.new_cache()
        for one in (cache, undisturbed):
            model(ids[:, :70], past_key_values=one)

        def interrupt(module, args):
            raise KeyboardInterrupt

        hook = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 70:80], past_key_values=cache)
        hook.remove()
        assert cache.seen == 70
        again = model(ids[:, 70:], past_key_values=cache).logits
        expected = model(ids[:, 70:], past_key_values=undisturbed).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_interrupted_compression_is_not_read_on_from(monkeypatch):
    model, ids = tiny(), tokens(1, 60)
    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(ids[:, :56], past_key_values=cache)
        monkeypatch.setattr(cache.slot_layers[2], "compress", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 56:], past_key_values=cache)
        monkeypatch.undo()
        with pytest.raises(LococoError, match="interrupted halfway"):
            model(ids[:, 56:], past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)


@torch.no_grad()
def test_reset_forgets_everything():
    model, ids = tiny(), tokens(1, 100)
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        first = model(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.seen == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, first)


@torch.no_grad()
def test_misuse_is_refused():
    model = tiny()
    with lococo.attach(model, "look-ahead", num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(tokens(2, 20), past_key_values=cache)
        with pytest.raises(ArgumentError, match="batch of 2, now a batch of 3"):
            model(tokens(3, 5), past_key_values=cache)
        with pytest.raises(ArgumentError, match=r"shape \(2, 25\), got \(2, 5\)"):
            model(tokens(2, 5), attention_mask=torch.ones(2, 5), past_key_values=cache)
    with pytest.raises(LococoError, match="not attached"):
        model(tokens(2, 5), past_key_values=cache)


def test_gradients_flow_through_successive_compressions():
    model = tiny()
    ids = tokens(1, 120)
    with lococo.attach(model, "lococo-paper", num_slots=40, chunk_size=16) as slots:
        heads = slots.compressor.merge
        torch.nn.init.constant_(heads.mix["1"], 0.3)
        cache = slots.new_cache()
        loss = -model(ids, past_key_values=cache).logits.log_softmax(-1)[0, -1, 5]
        loss.backward()
    assert heads.mix["1"].grad.abs() > 0
    assert heads.convolutions["1"].weight.grad.abs().sum() > 0
    assert model.model.embed_tokens.weight.grad[ids[0, :10]].abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gemma3n", "deepseek-v3"])
def test_gradients_of_queries_alone_are_those_of_the_full_cache(family):
    # Keys of the first layer need no gradient themselves, and yet what the queries saw of them must stay as it was.
    model = copy.deepcopy(tiny(family)).requires_grad_(False)
    queries = [weight for name, weight in model.named_parameters() if ".q_proj." in name or ".q_b_proj." in name]
    for weight in queries:
        weight.requires_grad_(True)
    gradients = []
    for compressor in ("full", "mass-merge"):
        with lococo.attach(model, compressor, num_slots=80, chunk_size=16) as slots:
            loss = -model(tokens(1, 80), past_key_values=slots.new_cache()).logits.log_softmax(-1)[0, :, 5].mean()
        gradients.append(torch.autograd.grad(loss, queries))
    for here, there in zip(*gradients, strict=True):
        assert there.abs().sum() > 0
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_what_was_read_in_inference_mode_goes_on_outside():
    model, ids = tiny(), tokens(1, 90)
    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
        cache, undisturbed = slots.new_cache(), slots.new_cache()
        with torch.inference_mode():
            model(ids[:, :50], past_key_values=cache)
        after = model(ids[:, 50:], past_key_values=cache).logits
        expected = model(ids, past_key_values=undisturbed).logits[:, 50:]
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", ["original", "packed"])
@torch.no_grad()
def test_positions_that_are_given_are_used(positions):
    model, ids = tiny(), tokens(1, 60)
    places = torch.arange(60)[None] * 3
    expected = model(ids, position_ids=places, past_key_values=DynamicCache(config=model.config)).logits
    with lococo.attach(model, "h2o", num_slots=60, chunk_size=16, positions=positions) as slots:
        logits = model(ids, position_ids=places, past_key_values=slots.new_cache()).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_interrupted_chunk_of_a_model_with_sliding_layers_is_not_read_on_from():
    model, ids = tiny("gemma3"), tokens(1, 60)

    def interrupt(module, args):
        raise KeyboardInterrupt

    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(ids[:, :30], past_key_values=cache)
        hook = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 30:], past_key_values=cache)
        hook.remove()
        with pytest.raises(LococoError, match="interrupted halfway"):
            model(ids[:, 30:], past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("compressor", ["full", "h2o", "mass-merge", REMEMBERING])
@torch.no_grad()
def test_a_fork_goes_on_by_itself(family, compressor):
    model, ids = tiny(family), tokens(1, 120)
    compressor = with_memory(model) if compressor == REMEMBERING else compressor
    with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
        alone = slots.new_cache()
        model(ids[:, :70], past_key_values=alone)
        other = fork(alone)
        seen_by_other = model(ids[:, :50], past_key_values=other).logits
        fork(alone).batch_repeat_interleave(2)
        went_on = model(ids[:, 70:], past_key_values=alone).logits
        for rest, expected in ((ids[:, 70:], went_on), (ids[:, :50], seen_by_other)):
            cache = slots.new_cache()
            model(ids[:, :70], past_key_values=cache)
            assert torch.equal(model(rest, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("compressor", [*LEARNING_FREE, REMEMBERING])
@torch.no_grad()
def test_rows_join_that_have_come_to_different_places(family, compressor, monkeypatch):
    model, ids, rest = tiny(family), tokens(4, 130), tokens(4, 24, seed=2)
    compressor = with_memory(model) if compressor == REMEMBERING else compressor
    monkeypatch.setattr(model.config, "max_position_embeddings", 96)
    with lococo.attach(model, compressor, slots_per_layer=[40, 45, 33, 42], chunk_size=16) as slots:
        alone = [slots.new_cache() for _ in range(4)]
        for row, (cache, length) in enumerate(zip(alone, (130, 1, 48, 90), strict=True)):
            model(ids[row : row + 1, :length], past_key_values=cache)
        batch = joined([alone[0], joined(alone[1:3]), alone[3]])
        assert batch.rows.tokens == [130, 1, 48, 90]
        assert_rows_are(batch, alone)
        for column in range(24):  # some of the rows are compressed in steps in which the others are not
            logits = model(rest[:, column : column + 1], past_key_values=batch).logits
            expected = [model(rest[i : i + 1, column : column + 1], past_key_values=alone[i]).logits for i in range(4)]
            torch.testing.assert_close(logits, torch.cat(expected), atol=2e-4, rtol=0)
        assert batch.rows.tokens == [154, 25, 72, 114]
        assert [row.rows.shifted for row in alone] == [[shifted] for shifted in batch.rows.shifted]
        assert max(batch.rows.shifted) > 0


@torch.no_grad()
def test_changes_of_norms_hold_for_joined_rows_that_hold_slots():
    model, ids = tiny(), tokens(2, 100)
    heads = heads_for(model, scale=0.05)
    heads.norms.delta += 0.2
    with lococo.attach(model, heads, num_slots=40, chunk_size=16) as slots:
        alone = [slots.new_cache(), slots.new_cache()]
        model(ids[:1], past_key_values=alone[0])
        model(ids[1:, :30], past_key_values=alone[1])
        assert [cache.slot_layers[0].held for cache in alone] == [[40], [0]]
        batch = joined(alone)
        for column in range(30, 70):  # on the way, the second row is compressed for the first time
            step = ids[:, column : column + 1]
            logits = model(step, past_key_values=batch).logits
            expected = [model(step[row : row + 1], past_key_values=alone[row]).logits for row in range(2)]
            torch.testing.assert_close(logits, torch.cat(expected), atol=2e-4, rtol=0)
        assert batch.slot_layers[0].held == [40, 40]


def joined(caches):
    made = fork(caches[0])
    for cache in caches[1:]:
        made.append(cache)
    return made


def assert_rows_are(batch, caches):
    """Each row of the batch holds, bit by bit, what its cache holds."""
    for row, cache in enumerate(caches):
        one = taken(batch, [row])
        assert {name: getattr(one.rows, name) for name in PER_ROW} == {n: getattr(cache.rows, n) for n in PER_ROW}
        for mine, theirs in zip(one.slot_layers, cache.slot_layers, strict=True):
            assert mine.filled == theirs.filled
            for name in SlotLayer.row_tensors:
                if getattr(theirs, name) is not None:
                    assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


@torch.no_grad()
def test_rows_that_are_taken_out_go_on_by_themselves():
    model, ids = tiny(), tokens(3, 100)
    with lococo.attach(model, "h2o+mass-merge", num_slots=40, chunk_size=16) as slots:
        batch = slots.new_cache()
        model(ids, past_key_values=batch)
        before = fork(batch)
        rows = [taken(batch, [row]) for row in (2, 0)]
        model(ids[:1, :30], past_key_values=rows[1])
        assert_rows_are(batch, [taken(before, [row]) for row in range(3)])
        assert_rows_are(joined([rows[0]]), [taken(before, [2])])


@torch.no_grad()
def test_rows_join_and_leave_while_the_others_stay_where_they_are():
    model, ids = tiny(), tokens(6, 100)
    with lococo.attach(model, "h2o+mass-merge", num_slots=40, chunk_size=16) as slots:
        alone = [slots.new_cache() for _ in range(6)]
        for row, cache in enumerate(alone):
            model(ids[row : row + 1, : 30 + 14 * row], past_key_values=cache)
        before = [fork(cache) for cache in alone]
        batch = alone[0]
        batch.append(alone[1])  # into new storage, with room for two others

        def places():
            tensors = (getattr(layer, name) for layer in batch.slot_layers for name in SlotLayer.row_tensors)
            return [tensor.data_ptr() for tensor in tensors if tensor is not None]

        stayed = places()
        batch.append(alone[2])
        batch.append(alone[3])
        assert places() == stayed
        batch.remove(1)
        assert_rows_are(batch, [before[row] for row in (0, 3, 2)])
        batch.remove(2)
        batch.append(alone[4])
        assert places() == stayed
        batch.append(alone[5])
        assert_rows_are(batch, [before[row] for row in (0, 3, 4, 5)])
        batch.append(before[1])
        assert places() != stayed
        assert_rows_are(batch, [before[row] for row in (0, 3, 4, 5, 1)])
        # Nobody's slots are written over by those who come into their place.
        assert_rows_are(joined(alone[1:]), before[1:])


@torch.no_grad()
def test_a_row_is_taken_out_without_copies_of_the_others(monkeypatch):
    model, ids = tiny(), tokens(3, 100)
    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
        batch = slots.new_cache()
        model(ids, past_key_values=batch)
        monkeypatch.setattr(SlotLayer, "fork", lambda *args: pytest.fail("the whole batch was copied"))
        assert taken(batch, [1]).nbytes * 3 == batch.nbytes


@torch.no_grad()
def test_what_cannot_be_joined_is_refused():
    model, ids = tiny(), tokens(1, 20)
    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
        one, empty = slots.new_cache(), slots.new_cache()
        model(ids, past_key_values=one)
        with pytest.raises(ArgumentError, match="empty cache"):
            joined([one, empty])
    with lococo.attach(model, "h2o", num_slots=41, chunk_size=16) as slots:
        other = slots.new_cache()
        model(ids, past_key_values=other)
    with pytest.raises(ArgumentError, match="one attachment"):
        joined([one, other])
    for family in ("gemma3", "falcon-h1"):
        model = tiny(family)
        with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:
            other = slots.new_cache()
            model(ids, past_key_values=other)
            with pytest.raises(ArgumentError, match="one by one"):
                joined([other, other])
