import torch
from families import heads_for, tiny, tokens

import lococo
from lococo.train.losses import teach
from lococo.train.matching import attended, attention_errors


def errors_of(model, compressor, ids, **options):
    with lococo.attach(model, compressor, **{"num_slots": 40, "chunk_size": 16, **options}) as slots:
        teacher = teach(slots, model, ids, torch.arange(56, ids.shape[1] - 1))
        return [(loss, count) for loss, count in attention_errors(model, ids, slots.new_cache(), teacher)], teacher


@torch.no_grad()
def test_the_full_cache_attends_as_the_model_does():
    model, ids = tiny(), tokens(1, 90)
    _, teacher = errors_of(model, "mass-merge", ids)
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions[1]
    model.set_attn_implementation("sdpa")
    layer = teacher.layer(1)
    keys, values = layer.keys[:, :, :90], layer.values[:, :, :90]
    query = layer.queries[:, :, :, :90].flatten(1, 2)
    causal = torch.full((90, 90), -torch.inf).triu(1)
    output, _ = attended(query, keys, values, causal, layer)
    torch.testing.assert_close(output, maps @ values.repeat_interleave(2, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_enough_slots_have_no_error_and_fewer_have_more():
    model, ids = tiny(), tokens(1, 150)
    means = []
    for num_slots in (150, 100, 40):
        losses, _ = errors_of(model, "mass-merge", ids, num_slots=num_slots)
        means.append(sum(float(loss) for loss, _ in losses) / sum(count for _, count in losses))
    assert abs(means[0]) < 1e-9
    assert 1e-6 < means[1] < means[2]


def test_every_layer_learns_alone():
    model, ids = tiny(), tokens(1, 150)
    heads = heads_for(model, scale=0.1).requires_grad_(True)
    losses, _ = errors_of(model, heads, ids)
    sum(loss for loss, _ in losses).backward()
    for layer in "0123":
        assert heads.mergers[layer].out.weight.grad.abs().max() > 0
    assert heads.norms.delta.grad is None
