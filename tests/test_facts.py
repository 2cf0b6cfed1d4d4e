import hashlib

import pytest
import torch
from families import SMALL, heads_for, tiny, tokens
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import lococo
from lococo.budgets import calibrated
from lococo.compressors import of_heads
from lococo.errors import FileFormatError, UnsupportedModelError
from lococo.facts import ModelFacts, weights_fingerprint


def test_facts_are_read_off_the_config():
    facts = ModelFacts.of(tiny("gpt2"))
    assert (facts.num_hidden_layers, facts.num_key_value_heads, facts.head_dim, facts.rope) == (4, 4, 12, {})
    assert ModelFacts.of(tiny("llama")).num_key_value_heads == 2
    assert ModelFacts.of(tiny("llama-yarn")).rope["rope_type"] == "yarn"


def test_the_same_shape_under_another_name_passes():
    recorded = ModelFacts.of(tiny()).to_dict()
    ModelFacts.of(tiny()).check(recorded | {"model": "somewhere/else"}, "file")
    with pytest.raises(
        FileFormatError, match=r"file was made for m .head_dim 64., but the model here is .* .head_dim 12."
    ):
        ModelFacts.of(tiny()).check(recorded | {"model": "m", "head_dim": 64}, "file")


def test_models_without_heads_have_no_facts():
    with pytest.raises(UnsupportedModelError, match="no attention heads"):
        ModelFacts.of(MambaForCausalLM(MambaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, state_size=4)))


class Packed(nn.Module):
    """A stand-in for quantised linear layers: four bits per weight in a buffer of bytes, with a scale per row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        levels = (linear.weight.detach() / scale).round().to(torch.int8) + 8
        self.register_buffer("packed", (levels[:, ::2] * 16 + levels[:, 1::2]).to(torch.uint8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        levels = torch.stack([self.packed // 16, self.packed % 16], -1).flatten(1)
        return x @ ((levels.to(x.dtype) - 8) * self.scale).T


class Halved(torch.Tensor):
    """A stand-in for torchao's weights: a tensor that wraps others and refuses to be cut up."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    def __init__(self, half):
        self.half_of_it = half

    def __tensor_flatten__(self):
        return ["half_of_it"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Halved(parts["half_of_it"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].half_of_it)
        if function is torch.ops.aten.t.default:
            return (2 * args[0].half_of_it).t()
        raise NotImplementedError(str(function))


def quantised(kind):
    """A tiny Llama whose decoder has such layers."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            if kind == "buffers":
                setattr(layer.self_attn, name, Packed(linear))
            else:
                linear.weight = nn.Parameter(Halved(linear.weight.detach() / 2), requires_grad=False)
    return model


def stored(model, kind):
    """The bytes or halves of the first such layer."""
    query = model.model.layers[0].self_attn.q_proj
    return query.packed if kind == "buffers" else query.weight.half_of_it


@pytest.mark.parametrize("kind", ["buffers", "wrapped"])
def test_the_fingerprint_sees_quantised_weights(kind):
    model = quantised(kind)
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(quantised(kind)) != weights_fingerprint(tiny())
    stored(model, kind)[0, 0] += 16
    assert weights_fingerprint(model) != before


def test_the_fingerprint_of_ordinary_models_is_of_their_parameters_alone():
    model = tiny()
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 8)]
        digest.update(name.encode() + sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    assert weights_fingerprint(model) == digest.hexdigest()[:16]


@pytest.mark.parametrize("kind", ["buffers", "wrapped"])
@torch.no_grad()
def test_models_with_quantised_weights_read_in_slots(kind):
    model, ids = quantised(kind), tokens(1, 120)
    full = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    with lococo.attach(model, "mass-merge", num_slots=120, chunk_size=16) as slots:
        torch.testing.assert_close(model(ids, past_key_values=slots.new_cache()).logits, full, atol=2e-4, rtol=0)
    heads = of_heads(heads_for(model, scale=0.1), "lococo")
    with lococo.attach(model, heads, num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        assert model(ids, past_key_values=cache).logits.isfinite().all()
        assert cache.slot_layers[0].held == [40]
    layers = calibrated(model, ids, compressor="mass-merge", num_slots=40, chunk_size=16, groups=2)
    assert sum(layers) == 4 * 40
