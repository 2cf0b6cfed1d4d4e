import pytest
import torch
from families import tiny, tokens
from transformers import DynamicCache

import lococo
from lococo import loops
from lococo.entries import Entries, attention_mass
from lococo.fast import SWITCH
from lococo.rope import LayerRotary


def naive_mass(keys, log_mass, queries, scaling, visible=None, softcap=None, weight=None):
    """Attention mass, one query at a time."""
    b, h, g, q, _ = queries.shape
    mass = torch.zeros(keys.shape[:3])
    for row in range(b):
        for head in range(h):
            for group in range(g):
                for i in range(q):
                    logits = keys[row, head] @ queries[row, head, group, i] * scaling
                    if softcap is not None:
                        logits = softcap * torch.tanh(logits / softcap)
                    logits = logits + log_mass[row, head]
                    if visible is not None:
                        logits[int(visible[row % len(visible), i]) :] = -torch.inf
                    factor = 1.0 if weight is None else float(weight[row, i])
                    mass[row, head] += factor * logits.softmax(0)
    return mass


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [3, 256])
def test_attention_mass_equals_the_naive_loop(softcap, rows, monkeypatch):
    monkeypatch.setattr("lococo.entries.QUERY_ROWS", rows)
    keys, log_mass, queries = torch.randn(2, 3, 11, 8), torch.rand(2, 3, 11), torch.randn(2, 3, 2, 7, 8)
    visible, weight = torch.randint(1, 12, (2, 7)), torch.rand(2, 7)
    mass = attention_mass(keys, log_mass, queries, scaling=0.5, softcap=softcap, visible=visible, weight=weight)
    torch.testing.assert_close(mass, naive_mass(keys, log_mass, queries, 0.5, visible, softcap, weight))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_mass_in_half_precision_is_the_exact_one_within_rounding(softcap, monkeypatch):
    monkeypatch.setattr(loops, "sums", lambda queries: False)  # as where there is no AVX-512
    keys, log_mass, queries = torch.randn(2, 3, 300, 16), torch.rand(2, 3, 300), torch.randn(2, 3, 2, 70, 16)
    keys, queries, visible = keys.bfloat16(), queries.bfloat16(), torch.randint(1, 301, (2, 70))
    options = {"scaling": 0.25, "softcap": softcap, "visible": visible}
    mass = attention_mass(keys, log_mass, queries, **options)
    monkeypatch.setenv(SWITCH, "1")
    exact = attention_mass(keys, log_mass, queries, **options)
    torch.testing.assert_close(exact, attention_mass(keys.float(), log_mass, queries.float(), **options))
    assert mass.dtype == torch.float32
    assert 0 < (mass - exact).norm() / exact.norm() < 2**-7


@pytest.mark.parametrize(
    ("w", "groups", "step"), [(511, 3, 1), (512, 3, 2), (767, 3, 2), (768, 3, 3), (1100, 3, 3), (512, 1, 1)]
)
def test_looking_ahead_asks_every_nth_query_of_long_chunks_and_of_each_group_others(w, groups, step, monkeypatch):
    seen = []

    def mass(keys, log_mass, queries, **options):
        seen.append(queries)
        return attention_mass(keys, log_mass, queries, **options)

    monkeypatch.setattr("lococo.entries.attention_mass", mass)
    shape = (1, 2, 1200)
    queries = torch.randn(1, 2, groups, w, 8)
    entries = Entries(
        keys=torch.randn(*shape, 8),
        values=torch.randn(*shape, 8),
        positions=torch.arange(1200).float().expand(shape),
        log_mass=torch.zeros(shape),
        token_index=torch.arange(1200).expand(shape),
        mass=None,
        queries=queries,
        rotary=LayerRotary(None, None),
        scaling=1.0,
    )
    assert entries.future_mass.sum().item() == pytest.approx(2 * groups * (w // step), rel=1e-4)
    asked = [set(range(w - 1 - group % step, -1, -step)[: w // step]) for group in range(groups)]
    for group, tokens_asked in enumerate(asked):
        torch.testing.assert_close(seen[0][:, :, group], queries[:, :, group, sorted(tokens_asked)])
    assert set.union(*asked) == set(range(w % step, w))


def eager_maps(model, ids):
    """transformers' own attention maps, (b h g q s) per layer."""
    output = model(ids, past_key_values=DynamicCache(config=model.config), output_attentions=True)
    return [attention.unflatten(1, (2, -1)) for attention in output.attentions]


@pytest.mark.parametrize("family", ["llama", "gemma2", "glm4", "phi3"])
@torch.no_grad()
def test_observed_mass_equals_eager_attentions_column_sums(family):
    model, ids = tiny(family, "eager"), tokens(2, 90)
    maps = eager_maps(model, ids)
    with lococo.attach(model, "h2o", num_slots=100, chunk_size=16) as slots:
        cache = slots.new_cache()
        for part in ids.split([5, 16, 16, 30, 23], 1):
            model(part, past_key_values=cache)
    for layer in cache.slot_layers:
        expected = maps[layer.layer_idx].sum((2, 3))
        torch.testing.assert_close(layer.mass[..., :90], expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_chunk_mass_is_read_off_the_last_queries():
    model, ids = tiny("llama", "eager"), tokens(2, 90)
    maps = eager_maps(model, ids)
    with lococo.attach(model, "snapkv", num_slots=100, chunk_size=16) as slots:
        cache = slots.new_cache()
        for part in ids.split([40, 7, 43], 1):
            model(part, past_key_values=cache)
        for layer, own in zip(cache.slot_layers, maps, strict=True):
            entries = layer.entries([0, 1], 90)
            for last in (1, 5, None):
                expected = own[..., -(last or 16) :, :].sum((2, 3))
                torch.testing.assert_close(entries.chunk_mass(last), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_future_mass_is_the_mass_of_queries_one_chunk_later():
    model, ids = tiny("llama"), tokens(1, 60)
    with lococo.attach(model, "look-ahead", num_slots=100, chunk_size=16, positions="original") as slots:
        cache = slots.new_cache()
        model(ids, past_key_values=cache)
        # The same queries, had their tokens come 16 positions later.
        later = slots.new_cache()
        model(ids, position_ids=torch.arange(16, 76)[None], past_key_values=later)
    for layer, moved in zip(cache.slot_layers[:1], later.slot_layers[:1], strict=True):
        entries = layer.entries([0], 60)
        queries = moved.entries([0], 60).queries
        expected = naive_mass(entries.keys, entries.log_mass, queries, entries.scaling)
        torch.testing.assert_close(entries.future_mass, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_gives_and_takes_no_mass():
    model, ids = tiny("llama"), tokens(1, 50)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1)
    both = torch.cat([padded, tokens(1, 59, seed=4)])
    mask = torch.ones_like(both)
    mask[0, :9] = 0
    with lococo.attach(model, "h2o", num_slots=64, chunk_size=16) as slots:
        together, alone = slots.new_cache(), slots.new_cache()
        model(both, attention_mask=mask, past_key_values=together)
        model(ids, past_key_values=alone)
    for layer, expected in zip(together.slot_layers, alone.slot_layers, strict=True):
        torch.testing.assert_close(layer.mass[:1, :, :50], expected.mass[..., :50], atol=1e-4, rtol=1e-4)
        assert layer.mass[0, :, :50].sum().item() == pytest.approx(50 * 4, rel=1e-4)
