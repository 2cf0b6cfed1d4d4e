import torch
from families import heads_for, tiny, tokens

from lococo.train import scores
from lococo.train.recall import Recall


def test_examples_are_taken_at_every_compression_of_every_layer():
    model = tiny()
    window = Recall(tokens(150).tolist(), [140, 145])
    taken = scores.collect(model, heads_for(model), window, num_slots=40, chunk_size=16, number=3)
    # 56 tokens fill the buffer; of the compressions at 56, 72, ... 136 the last sees less than half a chunk further.
    assert {layer: len(examples) for layer, examples in taken.items()} == dict.fromkeys(range(4), 6)
    first = taken[0][0]
    assert (first.ahead.shape, first.num_slots, first.window) == ((2, 56), 40, 3)
    # What the next queries give, and what the two that answer give.
    assert 0 < first.mass.sum(-1).max() < 2


def test_what_will_be_asked_for_is_kept_while_examples_are_taken():
    model, heads = tiny(), heads_for(tiny())
    ids = tokens(150).tolist()
    asking, plain = (
        scores.collect(model, heads, Recall(ids, asked), num_slots=40, chunk_size=16, number=0) for asked in ([149], [])
    )
    # The last query's attention to what the first compression left, in the second one's examples.
    gains = [
        (one.mass.sum(-1) - other.mass.sum(-1)).mean()
        for layer in asking
        for one, other in zip(asking[layer][1:2], plain[layer][1:2], strict=True)
    ]
    assert min(gains) > 0


def test_a_fit_finds_what_tells_which_entries_matter():
    torch.manual_seed(0)
    heads = heads_for(tiny()).requires_grad_(True)
    examples = []
    for window in range(30):
        content, facts = torch.randn(2, 60, 24), torch.randn(2, 60, 7)
        mass = (content[..., 0] > 0.5).float() / 60
        examples.append(scores.Example(content, facts, torch.rand(2, 60) + 0.1, mass, 30, window))
    lost = scores.fit(heads, {1: examples}, epochs=80)
    before, after = lost[1]
    assert after < 0.1 * before
    # What comes after is what was kept.
    apart = [example for example in examples if example.window < 4]
    assert scores.lost_mass(heads.scorers["1"], apart) == torch.tensor(after)


def test_a_fit_that_makes_things_worse_is_taken_back():
    torch.manual_seed(0)
    heads = heads_for(tiny()).requires_grad_(True)
    examples = []
    for window in range(4):
        content = torch.randn(2, 60, 24)
        # The window that is kept apart says the opposite of the others.
        matters = content[..., 0] < -0.5 if window == 0 else content[..., 0] > 0.5
        ahead = torch.rand(2, 60) * 0.1 + 1
        examples.append(scores.Example(content, torch.randn(2, 60, 7), ahead, matters.float() / 60, 30, window))
    before, after = scores.fit(heads, {1: examples}, epochs=80)[1]
    assert before == after
    assert all(not part.any() for part in heads.scorers["1"].out.parameters())
