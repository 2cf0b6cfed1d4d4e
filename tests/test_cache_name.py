import inspect
import warnings

import torch
from families import tiny, tokens
from torch import nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

import lococo
from lococo.cache_name import CACHE_NAMES, cache_name

# What the transformers at hand takes.
CURRENT = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)


class Older(nn.Module):
    """A decoder with code of its own, written before the argument was renamed."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        raise NotImplementedError


class Newer(nn.Module):
    def forward(self, input_ids, cache=None, **kwargs):
        raise NotImplementedError


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def test_a_models_own_forward_tells_the_name():
    assert cache_name(Older()) == "past_key_values"
    assert cache_name(Newer()) == "cache"
    assert cache_name(Wrapper(Older())) == "past_key_values"
    assert cache_name(Wrapper(Newer())) == "cache"
    assert cache_name(tiny()) == cache_name(tiny().base_model) == cache_name(Wrapper(tiny())) == CURRENT


@torch.no_grad()
def test_reading_calls_no_argument_by_a_name_that_is_going():
    model, ids = tiny(), tokens(1, 80)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pytest ignores this one, which tests give rise to themselves
        expected = lococo.prefill(model, ids, DynamicCache(config=model.config))
        with lococo.attach(model, "mass-merge", num_slots=64, chunk_size=32) as slots:
            assert cache_name(model) == cache_name(model.base_model) == CURRENT
            torch.testing.assert_close(lococo.prefill(model, ids, slots.new_cache()), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_generate_takes_a_cache_by_either_name():
    model, ids = tiny(), tokens(1, 80)
    with lococo.attach(model, "mass-merge", num_slots=32, chunk_size=16) as slots:
        answers = [
            model.generate(ids, **{name: slots.new_cache()}, max_new_tokens=20, do_sample=False)
            for name in ("past_key_values", CURRENT)
        ]
    assert torch.equal(*answers)
