import torch
from families import heads_for, tiny, tokens

import lococo
from lococo.train import scores
from lococo.train.losses import later_mass, teach
from lococo.train.recall import Recall


def test_examples_are_taken_at_every_compression_of_every_layer():
    model = tiny()
    window = Recall(tokens(150).tolist(), [130, 145])
    taken = scores.collect(model, heads_for(model), window, num_slots=40, chunk_size=16, number=3)
    # 56 tokens fill the buffer; compressions at 56, 72, ... 136.
    assert {layer: len(examples) for layer, examples in taken.items()} == dict.fromkeys(range(4), 6)
    first = taken[0][0]
    assert (first.ahead.shape, first.num_slots, first.window) == ((2, 56), 40, 3)
    assert 0 < first.recalled.sum(-1).min() <= first.recalled.sum(-1).max() < 1


def test_no_examples_where_nothing_is_asked():
    model = tiny()
    taken = scores.collect(
        model, heads_for(model), Recall(tokens(150).tolist(), [100]), num_slots=40, chunk_size=16, number=0
    )
    assert {len(examples) for examples in taken.values()} == {3}


def test_what_will_be_asked_for_is_kept_while_examples_are_taken():
    model, ids = tiny(), tokens(150).tolist()
    heads = heads_for(model)
    kept = {}
    for asked in ([149], [60]):
        taken = scores.collect(model, heads, Recall(ids, asked), num_slots=40, chunk_size=16, number=0)
        kept[asked[0]] = taken
    # What the last token will attend to is still there after five compressions, more of it than look-ahead keeps.
    with lococo.attach(model, "mass-merge", num_slots=40, chunk_size=16) as slots, torch.no_grad():
        teacher = teach(slots, model, torch.tensor([ids]), torch.tensor([149]))
        cache = slots.new_cache()
        model(torch.tensor([ids[:136]]), past_key_values=cache)
        for layer, examples in kept[149].items():
            entries = cache.layers[layer].entries([0], cache.layers[layer].filled[0])
            found = later_mass(teacher, layer, entries, seen=136, places=torch.tensor([149]))
            assert examples[-1].recalled.sum() > found.sum()


def test_a_fit_finds_what_tells_which_entries_matter():
    torch.manual_seed(0)
    heads = heads_for(tiny()).requires_grad_(True)
    examples = []
    for window in range(30):
        content, facts = torch.randn(2, 120, 24), torch.randn(2, 120, 7)
        asked = (content[..., 0] > 0.5).float() / 120
        ahead = torch.rand(2, 120) * 0.1 + 1
        examples.append(scores.Example(content, facts, ahead, asked, 60, window))
    before, after = scores.fit(heads, {1: examples}, recall_weight=3.0, epochs=80)[1]
    # Half of the look-ahead mass goes whatever stays.
    assert after - 0.5 < 0.1 * (before - 0.5)
    # What comes after is what was kept.
    apart = [example for example in examples if example.window < 4]
    assert scores.lost_mass(heads.scorers["1"], apart, 3.0) == torch.tensor(after)


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
