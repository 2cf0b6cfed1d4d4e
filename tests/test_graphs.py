import copy

import pytest
import torch
from families import tiny, tokens
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional

import lococo
from lococo import graphs
from lococo.reader import prefill


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))
        self.factor, self.names = 2.0, ["a"]

    def forward(self, values):
        return self.linear(values) * self.factor + self.shift * len(self.names)


def doubled(block, values, more):
    result = block(values) * 2
    return result if more is None else result + more


@pytest.mark.usefixtures("traced")
def test_what_changes_in_a_module_is_seen_and_compiled_once():
    torch.manual_seed(0)
    block, values = nn.Sequential(Block()), torch.randn(1, 4)
    inner = block[0]
    compiled = graphs.Graphs(doubled, block)
    counters.clear()

    def same(more=None):
        with torch.no_grad():
            mine = compiled(more is None, block, values, more)
            assert torch.allclose(mine, doubled(block, values, more), atol=1e-6)
        return counters["stats"]["unique_graphs"]

    assert same() == same() == 1
    # What tensors hold, and other tensors of their shape, are read anew.
    inner.linear.weight.data.mul_(3)
    inner.linear.weight = nn.Parameter(torch.randn(4, 4))
    inner.shift = torch.full((4,), 5.0)
    assert same() == 1
    assert same(torch.ones(4)) == 2
    inner.factor = 7.0
    assert same() == 3
    inner.factor = 2.0
    assert same() == 3
    inner.names.append("b")
    assert same() == 4
    handle = inner.linear.register_forward_hook(graphs.marked(lambda module, inputs, output: output + 1))
    assert same() == 5
    handle.remove()
    assert same() == 5
    inner.linear = nn.Sequential(inner.linear, nn.ReLU())
    assert same() == 6
    block.double()
    values = values.double()
    assert same() == 7


@pytest.mark.usefixtures("traced")
def test_what_may_look_at_anything_runs_as_it_is_written():
    block, values = Block(), torch.randn(1, 4)
    compiled, seen = graphs.Graphs(doubled, block), []

    @torch.no_grad()
    def same():
        before = counters["stats"]["unique_graphs"]
        assert torch.allclose(compiled(0, block, values, None), doubled(block, values, None), atol=1e-6)
        return counters["stats"]["unique_graphs"] - before

    assert same() == 1
    scale = [1.0]
    for hooks in (block.linear.register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = hooks(lambda module, inputs, output: seen.append(scale[0]) or output * scale[0])
        for each in (1.0, 3.0):
            scale[0] = each
            assert same() == 0
        handle.remove()
    # Both readings of each step: one module has the first hook, three the second.
    assert seen == [1.0] * 2 + [3.0] * 2 + [1.0] * 4 + [3.0] * 4
    assert same() == 0


@pytest.mark.usefixtures("traced")
def test_a_module_that_never_stays_the_same_is_not_compiled_again_and_again():
    block, values = Block(), torch.randn(1, 4)
    compiled = graphs.Graphs(doubled, block)
    counters.clear()
    for number in range(graphs.MOST_STATES + 4):
        block.calls = number
        block.last = torch.full((2,), float(number))
        with torch.no_grad():
            assert torch.allclose(compiled(0, block, values, None), doubled(block, values, None), atol=1e-6)
    assert counters["stats"]["unique_graphs"] <= graphs.MOST_STATES


@pytest.mark.usefixtures("traced")
def test_weights_of_other_strides_are_another_kind():
    block, values = Block(), torch.randn(1, 4)
    compiled = graphs.Graphs(doubled, block)
    for weight in (torch.randn(4, 4), torch.randn(4, 4).T):
        block.linear.weight = nn.Parameter(weight)
        with torch.no_grad():
            assert torch.allclose(compiled(0, block, values, None), doubled(block, values, None), atol=1e-6)


@pytest.mark.usefixtures("traced")
@torch.no_grad()
def test_the_last_step_is_compiled_for_any_number_of_models():
    for width in range(2, 14):
        row, weight = torch.randn(width), torch.randn(5, width)
        assert torch.allclose(graphs.linear_step(row, weight, None), weight @ row, atol=1e-5)


@pytest.mark.usefixtures("traced")
def test_a_graph_of_one_object_is_not_that_of_another():
    one, other = Block(), Block()
    other.factor = 9.0
    for block in (one, other):
        compiled = graphs.Graphs(doubled, block)
        with torch.no_grad():
            values = torch.randn(1, 4)
            assert torch.allclose(compiled(0, block, values, None), doubled(block, values, None), atol=1e-6)


@pytest.mark.usefixtures("traced")
def test_adapters_taken_away_between_two_steps_are_gone():
    torch.manual_seed(0)
    model, ids = copy.deepcopy(tiny()), tokens(1, 24)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    logits = {}
    for compiled in (False, True):
        with lococo.attach(model, "mass-merge", num_slots=32, chunk_size=16, compiled=compiled) as slots:
            cache = slots.new_cache()
            with torch.no_grad():
                prefill(model, ids[:, :20], cache)
                with_adapters = prefill(model, ids[:, 20:21], cache)
                with tuned.disable_adapter():
                    without = prefill(model, ids[:, 21:22], cache)
                again = prefill(model, ids[:, 22:23], cache)
            logits[compiled] = torch.stack([with_adapters, without, again])
    assert (logits[True] - logits[False]).abs().max() < 2e-5


def test_products_and_sums_are_those_of_the_libraries():
    torch.manual_seed(0)
    row, weight, bias = torch.randn(1, 1, 24), torch.randn(40, 24), torch.randn(40)
    mine = graphs._row_times_matrix(row, weight, bias)
    assert torch.allclose(mine, functional.linear(row, weight, bias), atol=1e-5)
    query, key, value = torch.randn(2, 4, 1, 12), torch.randn(2, 4, 30, 12), torch.randn(2, 4, 30, 12)
    mask = torch.randn(2, 4, 1, 30).masked_fill(torch.rand(2, 4, 1, 30) < 0.3, -torch.inf)
    mine = graphs._attention_of_one_query(query, key, value, mask, scale=0.3)
    assert torch.allclose(mine, functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3), atol=1e-5)
