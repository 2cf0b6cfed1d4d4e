import copy

import pytest
import torch
from families import SMALL, heads_for, left_padded, tiny, tokens
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import lococo
from lococo import graphs, loops
from lococo.reader import prefill
from lococo.slot_layer import SlotLayer

NAMES = SlotLayer.row_tensors


def decoded(model, compressor, ids, mask, prompt, *, compiled):
    """Read a prompt, then token by token; logits of every step, and the cache."""
    with lococo.attach(model, compressor, num_slots=40, chunk_size=16, compiled=compiled) as slots, torch.no_grad():
        cache = slots.new_cache()
        logits = [prefill(model, ids[:, :prompt], cache, attention_mask=mask)]
        for place in range(prompt, ids.shape[1]):
            logits.append(prefill(model, ids[:, place : place + 1], cache, attention_mask=mask))
        return torch.stack(logits), cache


@pytest.mark.parametrize("compressor", ["h2o", "lococo", "lococo with memory"])
def test_compiled_steps_do_what_plain_ones_do_in_one_graph(compressor, request):
    if compressor == "lococo":  # whose loops are also those of heads with memory
        request.getfixturevalue("traced")
    # From a cache that was never compressed through three compressions, rows at different places.
    model = tiny()
    if compressor != "h2o":
        compressor = heads_for(model, scale=0.05, memory=0.5 * compressor.endswith("memory"))
    ids, mask = left_padded(tokens(2, 100), [0, 9])
    model(ids[:, :9], output_hidden_states=True)  # which leaves hooks of transformers' behind
    plain, cache = decoded(model, compressor, ids, mask, 30, compiled=False)
    counters.clear()
    compiled, same = decoded(model, compressor, ids, mask, 30, compiled=True)
    assert (plain - compiled).abs().max() < 2e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for one, other in zip(cache.layers, same.layers, strict=True):
        for name in NAMES:
            held, compared = getattr(one, name), getattr(other, name)
            assert (held is None) == (compared is None)
            if held is not None:
                width = held.shape[3] if name == "queries" else max(one.filled)
                dimension = 3 if name == "queries" else 2
                difference = held.narrow(dimension, 0, width) - compared.narrow(dimension, 0, width)
                assert difference.abs().max() < 2e-5, name


@pytest.mark.parametrize("biased", [False, True])
def test_steps_whose_attention_and_products_are_loops_do_what_plain_ones_do(biased, request):
    if not biased:  # the compiled loops are the same
        request.getfixturevalue("traced")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"head_dim": 16})).eval()
    if not loops.attends(*2 * [torch.empty(1, 1, 1, 16)]):
        pytest.skip("no loops: the processor lacks AVX-512, or there is no C++ compiler")
    if biased:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    ids, mask = left_padded(tokens(2, 100), [0, 9])
    plain, cache = decoded(model, "mass-merge", ids, mask, 30, compiled=False)
    assert any(layer.log_mass.isfinite().logical_and(layer.log_mass != 0).any() for layer in cache.layers)
    compiled, same = decoded(model, "mass-merge", ids, mask, 30, compiled=True)
    assert all(layer.looped for layer in same.step.layers)
    assert (plain - compiled).abs().max() < 2e-5


def test_generate_and_one_row_of_logits_are_the_same_compiled():
    model, ids = tiny(), tokens(1, 50)
    answers = []
    for compiled in (False, True):
        with lococo.attach(model, "mass-merge", num_slots=32, chunk_size=16, compiled=compiled) as slots:
            options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
            answers.append(model.generate(ids, past_key_values=slots.new_cache(), **options))
    assert torch.equal(*answers)
    assert "forward" not in vars(model.get_output_embeddings())


def test_what_no_step_can_do_is_read_the_plain_way():
    model, ids = tiny("gemma3"), tokens(1, 60)
    with lococo.attach(model, "mass-merge", num_slots=32, chunk_size=16, compiled=True) as slots, torch.no_grad():
        counters.clear()
        cache = slots.new_cache()
        prefill(model, ids, cache)  # its sliding layers grow and wrap around
        prefill(model, ids[:, :1], cache)
        assert all("step" not in str(graph) for graph in counters["frames"])
        assert cache.step is None
    with lococo.attach(tiny(), "mass-merge", num_slots=32, chunk_size=16, compiled=True) as slots:
        cache = slots.new_cache()
        tiny()(ids[:, :1], past_key_values=cache)  # the first token: nothing is allocated yet
        output = tiny()(ids[:, :1], past_key_values=cache, output_hidden_states=True)
        assert cache.step is None
        assert len(output.hidden_states) == 5


@pytest.mark.usefixtures("traced")
def test_steps_of_embeddings_are_compiled_and_those_that_show_more_are_not():
    model, ids = copy.deepcopy(tiny()), tokens(1, 60)
    embedded = model.get_input_embeddings()(ids[:, :1])
    with lococo.attach(model, "mass-merge", num_slots=32, chunk_size=16, compiled=True) as slots, torch.no_grad():
        counters.clear()
        rows, pair = tokens(2, 70), slots.new_cache()
        prefill(model, rows[:, :60], pair)
        for end in range(61, 66):  # slices of whatever strides are one kind
            places = torch.arange(end)[None].repeat(2, 1)[:, -1:]
            model(rows[:, :end][:, -1:], past_key_values=pair, position_ids=places)
        assert counters["stats"]["unique_graphs"] == 1
        plain, cache = slots.new_cache(), slots.new_cache()
        for each in (plain, cache):
            prefill(model, ids, each)
        one = model(ids[:, :1], past_key_values=plain)
        other = model(inputs_embeds=embedded, past_key_values=cache)
        assert cache.step is not None
        assert (one.logits - other.logits).abs().max() < 2e-5
        cache.reset()
        assert cache.step is None
        prefill(model, ids, cache)
        pair = model.base_model(ids[:, :1], past_key_values=cache, return_dict=False)
        assert isinstance(pair, tuple)
        model.config.output_hidden_states = True
        assert len(model(ids[:, :1], past_key_values=cache).hidden_states) == 5
        assert cache.step is None


def test_steps_of_a_model_with_hooks_run_as_they_are_written():
    model, ids, seen, logits = copy.deepcopy(tiny()), tokens(1, 60), [], {}
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(len(seen)) or output * 1.5)
    for compiled in (False, True):
        counters.clear()
        with lococo.attach(model, "h2o", num_slots=32, chunk_size=16, compiled=compiled) as slots, torch.no_grad():
            cache = slots.new_cache()
            prefill(model, ids, cache)
            before = len(seen)
            logits[compiled] = torch.stack([prefill(model, ids[:, n : n + 1], cache) for n in range(30)])
            assert len(seen) == before + 30
            assert (cache.step is not None) == compiled
    assert (logits[True] - logits[False]).abs().max() < 2e-5


@pytest.mark.usefixtures("traced")
def test_a_cache_of_another_compressor_is_another_kind():
    model, ids = tiny(), tokens(1, 60)
    heads = heads_for(model, scale=0.3)
    assert heads.norms is not None
    other = lococo.attach(model, "mass-merge", num_slots=32, chunk_size=16)
    logits = {}
    for compiled in (False, True):
        with lococo.attach(model, heads, num_slots=32, chunk_size=16, compiled=compiled) as slots, torch.no_grad():
            caches = [other.new_cache(), slots.new_cache()]
            for each in caches:
                prefill(model, ids, each)
            logits[compiled] = torch.stack([prefill(model, ids[:, :1], each) for each in (*caches, *caches)])
    assert (logits[True] - logits[False]).abs().max() < 2e-5
    assert (logits[True][0] - logits[True][1]).abs().max() > 1e-3


def test_without_a_compiler_decoding_says_so_in_one_line(monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(graphs, "_backend", no_compiler)
    model, ids = tiny("qwen3"), tokens(1, 30)
    with lococo.attach(model, "mass-merge", num_slots=32, chunk_size=16, compiled=True) as slots, torch.no_grad():
        cache = slots.new_cache()
        model.base_model(ids, past_key_values=cache)
        with pytest.raises(
            lococo.LococoError, match=r"could not be compiled \(.*no C\+\+ compiler.*leave out compiled"
        ):
            model.base_model(ids[:, :1], past_key_values=cache)
        held = cache.rows.tokens
    assert held == [30]
