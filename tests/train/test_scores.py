import random

import torch
from families import heads_for, tiny, tokens

from lococo.train import scores


def test_examples_are_taken_at_every_compression_of_every_layer():
    model = tiny()
    taken = scores.collect(model, heads_for(model), tokens(1, 150), num_slots=40, chunk_size=16, window=3)
    # 56 tokens fill the buffer; of the compressions at 56, 72, ... 136 the last sees less than half a chunk further.
    assert {layer: len(examples) for layer, examples in taken.items()} == dict.fromkeys(range(4), 6)
    first = taken[0][0]
    assert (first.prior.shape, first.num_slots, first.window) == ((2, 56), 40, 3)
    assert 0 < first.mass.sum(-1).max() < 1


def test_a_fit_finds_what_tells_which_entries_matter():
    torch.manual_seed(0)
    heads = heads_for(tiny()).requires_grad_(True)
    examples = []
    for window in range(30):
        content, facts = torch.randn(2, 60, 24), torch.randn(2, 60, 7)
        mass = (content[..., 0] > 0.5).float() / 60
        examples.append(scores.Example(content, facts, torch.randn(2, 60), mass, 30, window))
    lost = scores.fit(heads, {1: examples}, epochs=80)
    before, after = lost[1]
    assert after < 0.1 * before
    # What comes after is what was kept.
    apart = [example for example in examples if example.window < 4]
    assert scores.lost_mass(heads.scorers["1"], apart) == torch.tensor(after)


def test_a_fit_that_makes_things_worse_is_taken_back():
    heads = heads_for(tiny()).requires_grad_(True)
    draw = random.Random(0)
    examples = []
    for window in range(4):
        mass = torch.rand(2, 60, generator=torch.Generator().manual_seed(draw.randrange(99)))
        examples.append(
            scores.Example(torch.randn(2, 60, 24), torch.randn(2, 60, 7), mass.clamp(min=1e-3).log(), mass, 30, window)
        )
    scores.fit(heads, {1: examples}, epochs=3, learning_rate=0.5)
    assert all(not part.any() for part in heads.scorers["1"].out.parameters())
