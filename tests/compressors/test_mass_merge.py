import math
from dataclasses import replace

import pytest
import torch
from test_base import entries_of

from lococo.compressors.mass_merge import BLOCK, TIE_BREAK, MassMerge, largest, others


@pytest.mark.parametrize("columns", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_the_largest_is_found_block_by_block(columns):
    rows = torch.randn(3, 7, columns)
    assert torch.equal(largest(rows), rows.argmax(-1))
    assert torch.equal(largest(-rows.abs() - 1e30), (-rows.abs() - 1e30).argmax(-1))


def naive_merge(entries, kept, max_log_mass):
    """Merge one entry at a time."""
    values, log_mass = entries.values.clone(), entries.log_mass.clone()
    keys = entries.rotary.rotate(entries.keys, -entries.positions)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    slot_values = torch.zeros(*kept.shape, values.shape[-1])
    slot_log_mass = torch.zeros(kept.shape)
    for row in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            mass, chosen = entries.future_mass[row, head], kept[row, head].tolist()
            members = {i: [i] for i in chosen}
            for i in set(range(len(entries))) - set(chosen):
                similarity = [
                    float(keys[row, head, i] @ keys[row, head, j]) + TIE_BREAK * j / len(entries) for j in chosen
                ]
                members[chosen[similarity.index(max(similarity))]].append(i)
            for slot, i in enumerate(chosen):
                total = sum(float(mass[j]) for j in members[i])
                slot_values[row, head, slot] = sum(mass[j] * values[row, head, j] for j in members[i]) / total
                slot_log_mass[row, head, slot] = min(
                    float(log_mass[row, head, i]) + math.log(total / float(mass[i])), max_log_mass
                )
    return slot_values, slot_log_mass


def test_merging_equals_the_naive_loop():
    entries = entries_of("h2o+mass-merge")
    kept = torch.rand(2, 2, 60).topk(25).indices.sort().values
    slots = MassMerge(max_log_mass=1.5)(entries, kept, entries.mass, 1)
    values, log_mass = naive_merge(entries, kept, 1.5)
    torch.testing.assert_close(slots.values, values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(slots.log_mass, log_mass, atol=1e-5, rtol=1e-4)
    assert torch.equal(slots.keys, entries.take(kept).keys)
    # what was observed is not lost
    torch.testing.assert_close(slots.mass.sum(-1), entries.mass.sum(-1))
    # the case is not trivial: some slots merged, some at the bound
    assert 0 < (slots.log_mass == 0).float().mean() < 1
    assert (slots.log_mass == 1.5).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_whose_key_repeats_stays_its_own_anchor(dtype):
    entries = entries_of("mass-merge")
    same = entries.unrotated_keys[:, :, :1].expand_as(entries.keys)
    keys = entries.rotary.rotate(same, entries.positions)
    entries = replace(entries, keys=keys.to(dtype), values=entries.values.to(dtype))
    kept = torch.arange(60)[None, None, ::2].expand(2, 2, -1)
    slots = MassMerge()(entries, kept, entries.future_mass, 1)
    # all dropped entries go to the last kept one, the others are untouched
    torch.testing.assert_close(slots.values[:, :, :-1], entries.take(kept).values[:, :, :-1])
    assert (slots.log_mass[:, :, :-1] == 0).all()
    assert (slots.log_mass[:, :, -1] > 0).all()


def test_the_others_are_found_with_and_without_counting():
    kept = torch.stack([torch.randperm(30)[:12].sort().values for _ in range(6)]).view(2, 3, 12)
    found = others(kept, 30)
    for row in range(2):
        for head in range(3):
            assert found[row, head].tolist() == sorted(set(range(30)) - set(kept[row, head].tolist()))
    which = torch.ones(2, 3, 30, dtype=torch.bool).scatter_(2, kept, False)
    assert torch.equal(which.byte().argsort(dim=-1, descending=True, stable=True)[..., :18], found)
    assert others(kept.to("meta"), 30).shape == (2, 3, 18)
