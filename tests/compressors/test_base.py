from dataclasses import fields, replace

import pytest
import torch
from families import tiny, tokens

import lococo
from lococo.compressors import PAIRS, Shape, make, modules, of_heads
from lococo.compressors.base import Selection, SelectMerge
from lococo.errors import ArgumentError
from lococo.train.recipe import Recipe
from lococo.train.trained import new_heads


@torch.no_grad()
def entries_of(compressor="h2o+mass-merge", length=60, batch=2):
    """Entries of one layer of a tiny model that has read random tokens."""
    with lococo.attach(tiny(), compressor, num_slots=100, chunk_size=16) as slots:
        cache = slots.new_cache()
        tiny()(tokens(batch, length), past_key_values=cache)
    return cache.slot_layers[1].entries(list(range(batch)), length)


def naive_selection(scores, sinks, recent, num_slots):
    s = len(scores)
    always = set(range(sinks)) | set(range(s - recent, s))
    rest = sorted(set(range(s)) - always, key=lambda i: -scores[i])
    return sorted(always | set(rest[: num_slots - len(always)]))


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (3, 0), (0, 5), (2, 4), (1, None)])
def test_selection_keeps_first_last_and_the_highest_scores(sinks, recent):
    entries = entries_of()
    scores = torch.rand(2, 2, 60)
    compressor = SelectMerge(
        "x", Selection(lambda _: scores, sinks=sinks, recent=recent), make("h2o", Shape({}, 12)).merge
    )
    slots = compressor.compress(entries, 20, 0)
    for row in range(2):
        for head in range(2):
            kept = naive_selection(scores[row, head].tolist(), sinks, 10 if recent is None else recent, 20)
            assert slots.token_index[row, head].tolist() == kept
            assert torch.equal(slots.keys[row, head], entries.keys[row, head, kept])
            assert torch.equal(slots.values[row, head], entries.values[row, head, kept])
            assert torch.equal(slots.mass[row, head], entries.mass[row, head, kept])


@pytest.mark.parametrize("name", [*PAIRS, "tova+mass-merge"])
def test_every_compressor_gives_exactly_its_slots_in_temporal_order(name):
    entries = entries_of(name)
    slots = make(name, Shape({1: 40}, 12)).compress(entries, 40, 1)
    assert len(slots) == 40
    assert (slots.token_index.diff() > 0).all()
    assert slots.keys.shape == (2, 2, 40, 12)
    assert slots.values.isfinite().all()


class Still:
    """Rotates nothing, since angles of tensors without numbers cannot be looked up."""

    def rotate(self, x, delta):
        return x

    def matrix(self, delta, head_dim, device):
        return torch.eye(head_dim, device=device)


@pytest.mark.parametrize("name", [*PAIRS, "learned"])
def test_no_compressor_makes_the_cpu_wait_for_a_gpu(name):
    # Tensors without numbers refuse what a GPU could only answer once it has done all that went before.
    compressor = fresh_heads() if name == "learned" else make(name, Shape({1: 40}, 12))
    for module in modules(compressor):
        module.to("meta")
    given = entries_of("look-ahead" if name == "learned" else name)
    tensors = {f.name: getattr(given, f.name) for f in fields(given)}
    there = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
    slots = compressor.compress(replace(given, **there | {"rotary": Still()}), 40, 1)
    assert slots.keys.shape == (2, 2, 40, 12)
    assert slots.keys.is_meta


def fresh_heads():
    recipe = Recipe(num_slots=(40,), chunk_size=16, length=128, calibrate_at=())
    heads = new_heads(tiny(), recipe)
    return of_heads(heads, heads.kind)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ArgumentError, match="did you mean 'snapkv'"):
        make("snap-kv", Shape({}, 12))
    with pytest.raises(ArgumentError, match="did you mean 'h2o\\+mass-merge'"):
        make("h2o+massmerge", Shape({}, 12))


def test_too_few_slots_for_what_always_stays():
    with pytest.raises(ArgumentError, match="8 first and last entries and needs at least 9 slots"):
        lococo.attach(tiny(), "look-ahead", num_slots=8)
    lococo.attach(tiny(), "look-ahead", num_slots=9)
