import copy

import pytest
import torch
from families import tiny, tokens

import lococo
from lococo.attention import PREFIX, _by_products, register
from lococo.compressors import of_heads
from lococo.fast import SWITCH
from lococo.train.recipe import Recipe
from lococo.train.trained import new_heads


@torch.no_grad()
def test_log_mass_makes_an_entry_count_several_times():
    # An entry of log_mass log(3) must act like the same entry three times.
    model = tiny()
    ids = tokens(1, 30)
    with lococo.attach(model, "h2o", num_slots=100, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(ids, past_key_values=cache)
        layer = cache.slot_layers[0]
        layer.chunk = type(
            "Chunk", (), {"counts": [1], "length": 1, "real": None, "biases": {}, "ordinal": torch.ones(1, 1)}
        )
        query = torch.randn(1, 4, 1, 12)
        layer.log_mass[..., 7] = torch.tensor(3.0).log()
        layer.carries_mass = True
        bias = layer.attention_bias(query)
        keys, values = layer.keys[:, :, :31], layer.values[:, :, :31]
        output = torch.nn.functional.scaled_dot_product_attention(
            query, keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1), bias
        )
        thrice = torch.tensor([*range(31), 7, 7])
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, keys[:, :, thrice].repeat_interleave(2, 1), values[:, :, thrice].repeat_interleave(2, 1)
        )
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("compressor", ["mass-merge", "h2o"])
@torch.no_grad()
def test_eager_and_sdpa_agree_after_compressions(compressor):
    ids = tokens(2, 150)
    outputs = []
    for attention in ("eager", "sdpa"):
        model = tiny("llama", attention)
        with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
            outputs.append(model(ids, past_key_values=slots.new_cache()).logits)
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("compressor", ["mass-merge", "h2o"])
def test_one_row_without_copies_is_what_the_model_itself_computes(compressor, monkeypatch):
    ids, outputs, gradients = tokens(1, 150), [], []
    fast = lococo.attention._without_copies
    seen = []
    for counted in (True, False):
        model = copy.deepcopy(tiny("llama", "sdpa")).requires_grad_()

        def slow(function, query, key, value, bias, *, model=model, **kwargs):
            groups = query.shape[1] // key.shape[1]
            if bias is not None and bias.shape[1] > 1:
                bias = bias.repeat_interleave(groups, 1)
            module = model.model.layers[0].self_attn
            return function(module, query, key, value, bias, **kwargs)

        def watched(*given, **kwargs):
            seen.append(given[1].shape)
            return fast(*given, **kwargs)

        monkeypatch.setattr(lococo.attention, "_without_copies", watched if counted else slow)
        with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
            logits = model(ids, past_key_values=slots.new_cache()).logits
        logits.sum().backward()
        outputs.append(logits.detach())
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert seen
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("with_bias", [True, False])
def test_products_of_matrices_are_attention_within_rounding(with_bias):
    query, key, value = (torch.randn(1, heads, n, 16).bfloat16() for heads, n in ((6, 20), (2, 50), (2, 50)))
    bias = torch.randn(1, 2, 20, 50).masked_fill(torch.arange(50) > 30 + torch.arange(20)[:, None], -torch.inf)
    bias = bias.bfloat16() if with_bias else None
    output = _by_products(query, key, value, bias, 0.3)
    logits = query.double() @ key.double().repeat_interleave(3, 1).transpose(2, 3) * 0.3
    logits = logits if bias is None else logits + bias.double().repeat_interleave(3, 1)
    expected = (logits.softmax(-1) @ value.double().repeat_interleave(3, 1)).transpose(1, 2)
    assert output.shape == (1, 20, 6, 16)
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() / expected.norm() < 2**-7


@pytest.mark.parametrize("compressor", ["streaming-llm", "mass-merge"])
@torch.no_grad()
def test_the_switch_takes_the_naive_twins_which_agree(compressor, monkeypatch):
    model, ids, taken = copy.deepcopy(tiny()).bfloat16(), tokens(1, 56 if compressor == "mass-merge" else 150), []
    fast = lococo.attention._by_products

    def watched(*given):
        taken.append(given[0].shape)
        return fast(*given)

    monkeypatch.setattr(lococo.attention, "_by_products", watched)
    outputs = []
    for naive in ("0", "1"):
        monkeypatch.setenv(SWITCH, naive)
        before = len(taken)
        with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
            outputs.append(model(ids, past_key_values=slots.new_cache()).logits.float())
        assert (len(taken) > before) == (naive == "0")
    assert torch.nn.functional.cosine_similarity(*outputs, -1).min() > 0.99


def test_heads_learn_in_half_precision_where_the_models_queries_have_no_gradient():
    model, ids = copy.deepcopy(tiny()).bfloat16().requires_grad_(False), tokens(1, 100)
    recipe = Recipe(
        heads="lococo-paper", num_slots=(24,), chunk_size=16, length=128, calibrate_at=(), learned_scores=False
    )
    heads = new_heads(model, recipe)
    with lococo.attach(model, of_heads(heads, "lococo-paper"), num_slots=24, chunk_size=16) as slots:
        model(ids, past_key_values=slots.new_cache()).logits.float().logsumexp(-1).sum().backward()
    gradients = [parameter.grad for parameter in heads.parameters() if parameter.grad is not None]
    assert sum(float(each.abs().sum()) for each in gradients) > 0


def test_the_name_tells_what_it_stands_on():
    assert register("sdpa") == PREFIX + "sdpa"


@torch.no_grad()
def test_half_precision_reads_the_same_text():
    ids = tokens(1, 150)
    model = tiny()
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        exact = model(ids, past_key_values=slots.new_cache()).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    with lococo.attach(half, "mass-merge", num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        logits = half(ids, past_key_values=cache).logits
    assert logits.dtype == torch.bfloat16
    assert cache.slot_layers[0].log_mass.dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(logits.float(), exact, -1)[0]
    assert similarity[:56].min() > 0.99
    # After a compression rounding may choose other slots, of which a random model makes much.
    assert similarity[56:].mean() > 0.7
    # Where rounding has no choice the results stay together.
    outputs = []
    for one in (model, half):
        with lococo.attach(one, "streaming-llm", num_slots=40, chunk_size=16) as slots:
            outputs.append(one(ids, past_key_values=slots.new_cache()).logits.float())
    assert torch.nn.functional.cosine_similarity(*outputs, -1).min() > 0.97
