import pytest
import torch
from families import tiny, tokens
from transformers import DynamicCache

import lococo
import lococo.reader
from lococo.errors import ArgumentError


@torch.no_grad()
def test_a_stream_reads_like_a_tensor():
    model, ids = tiny(), tokens(1, 150)
    pieces = [part[0].tolist() for part in ids.split([1, 70, 0, 2, 77], 1)]
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        expected = lococo.prefill(model, ids, slots.new_cache())
        steps = []
        cache = slots.new_cache()
        streamed = lococo.prefill(model, iter(pieces), cache, progress=steps.append)
    torch.testing.assert_close(streamed, expected, atol=1e-4, rtol=0)
    assert cache.seen == sum(steps) == 150
    # 40 + 16 tokens until the first compression, then 16 at a time
    assert steps == [16, 16, 16, 8, 16, 16, 16, 16, 16, 14]


@pytest.mark.parametrize("compressor", ["full", "mass-merge"])
@torch.no_grad()
def test_score_equals_the_whole_text_at_once(compressor):
    model, ids = tiny(), tokens(2, 90)
    logits = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    with lococo.attach(model, compressor, num_slots=90, chunk_size=16) as slots:
        whole = lococo.score(model, ids, slots.new_cache())
        cache = slots.new_cache()
        previous = lococo.prefill(model, ids[:, :30], cache)
        rest = lococo.score(model, ids[:, 30:], cache, previous=previous)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(rest, expected[:, 29:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_stream_equals_generate():
    model, ids = tiny(), tokens(1, 100)
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots:
        expected = model.generate(ids, past_key_values=slots.new_cache(), max_new_tokens=50, do_sample=False)
        cache = slots.new_cache()
        answer = list(lococo.stream(model, ids, cache, max_new_tokens=50))
    assert answer == expected[0, 100:].tolist()
    assert cache.seen == 150


@torch.no_grad()
def test_sampling_repeats_with_its_seed_and_ends_at_the_end_token(monkeypatch):
    model, ids = tiny(), tokens(1, 100)
    with lococo.attach(model, "h2o", num_slots=40, chunk_size=16) as slots:

        def answer(**options):
            return list(lococo.stream(model, ids, slots.new_cache(), max_new_tokens=20, **options))

        sampled = answer(temperature=2.0, seed=3)
        assert sampled == answer(temperature=2.0, seed=3)
        assert sampled != answer(temperature=2.0, seed=4)
        assert answer(temperature=2.0, top_k=1, seed=5) == answer()
        assert answer(temperature=2.0, top_p=1e-6, seed=5) == answer()
        monkeypatch.setattr(model.generation_config, "eos_token_id", [sampled[7]])
        assert answer(temperature=2.0, seed=3) == sampled[: sampled.index(sampled[7])]


@torch.no_grad()
def test_misuse_is_refused():
    model = tiny()
    cache = DynamicCache(config=model.config)
    with pytest.raises(ArgumentError, match="at least one token"):
        lococo.prefill(model, tokens(1, 0), cache)
    with pytest.raises(ArgumentError, match="at least one token"):
        lococo.prefill(model, iter([]), cache)
    with pytest.raises(ArgumentError, match="one prompt at a time"):
        next(lococo.stream(model, tokens(2, 3), cache))
    with pytest.raises(ArgumentError, match="temperature"):
        next(lococo.stream(model, tokens(1, 3), cache, temperature=-1.0))
    with pytest.raises(ArgumentError, match="top_p"):
        next(lococo.stream(model, tokens(1, 3), cache, temperature=1.0, top_p=0.0))


@pytest.mark.real_model
@torch.no_grad()
def test_a_text_shorter_than_the_slots_scores_as_with_the_full_cache(default_model):
    model, tokenizer = default_model
    ids = tokenizer(lococo.__doc__ + lococo.reader.__doc__, return_tensors="pt").input_ids
    assert 200 < ids.shape[1] < 512
    scores = []
    for compressor in ("full", "mass-merge"):
        with lococo.attach(model, compressor, num_slots=512, chunk_size=64) as slots:
            scores.append(lococo.score(model, ids, slots.new_cache()))
    torch.testing.assert_close(*scores, atol=1e-4, rtol=0)
