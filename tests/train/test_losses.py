import copy

import pytest
import torch
from families import heads_for, tiny, tokens

import lococo
from lococo.train.losses import divergences, later_mass, next_token_losses, retention_loss, teach


def read_window(model, heads, ids, **options):
    options = {"num_slots": 40, "chunk_size": 16} | options
    with lococo.attach(model, heads, **options) as slots:
        compared = torch.arange(56, ids.shape[1] - 1)
        teacher = teach(slots, model, ids, compared)
        cache = slots.new_cache()
        divergence = sum(loss for loss, _ in divergences(model, ids, cache, teacher))
        nll = sum(loss for loss, _ in next_token_losses(model, ids, slots.new_cache(), compared, chunk_size=16))
    return teacher, divergence, nll


@torch.no_grad()
def test_the_teacher_is_the_model_alone():
    model, ids = tiny(), tokens(1, 120)
    teacher, _, _ = read_window(model, heads_for(model), ids)
    expected = model(ids).logits[:, 56:119].log_softmax(-1)
    torch.testing.assert_close(teacher.log_probabilities, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_losses_equal_those_of_the_logits():
    model, ids = tiny(), tokens(1, 120)
    heads = heads_for(model, scale=0.1)
    teacher, divergence, nll = read_window(model, heads, ids)
    with lococo.attach(model, heads, num_slots=40, chunk_size=16) as slots:
        mine = model(ids, past_key_values=slots.new_cache()).logits[:, 56:119].log_softmax(-1)
    expected = torch.nn.functional.kl_div(mine, teacher.log_probabilities, log_target=True, reduction="sum")
    torch.testing.assert_close(divergence, expected, atol=1e-4, rtol=1e-4)
    targets = torch.nn.functional.nll_loss(mine[0], ids[0, 57:], reduction="sum")
    torch.testing.assert_close(nll, targets, atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_enough_slots_have_no_divergence():
    model, ids = tiny(), tokens(1, 120)
    _, divergence, _ = read_window(model, heads_for(model, scale=0.1), ids, num_slots=120)
    assert divergence.abs() < 1e-5


def test_the_gradient_passes_several_compressions():
    model, ids = copy.deepcopy(tiny()).requires_grad_(False), tokens(1, 120)
    gradients = []
    for cut in (False, True):
        heads = heads_for(model, scale=0.1).requires_grad_(True)
        with lococo.attach(model, heads, num_slots=40, chunk_size=16) as slots:
            teacher = teach(slots, model, ids, torch.arange(100, 119))
            cache = slots.new_cache()
            for start in range(0, 96, 8):
                model(ids[:, start : start + 8], past_key_values=cache)
            if cut:
                cache.detach()
            # The last chunk alone: what reaches the heads comes through the compressions before it.
            logits = model(ids[:, 96:104], past_key_values=cache).logits[:, 4:]
            (-(logits.log_softmax(-1) * teacher.log_probabilities[:, :4].exp()).sum()).backward()
        gradients.append(heads.mergers["1"].out.weight.grad)
    assert gradients[0].abs().max() > 1e-6
    assert gradients[1] is None or gradients[1].abs().max() < gradients[0].abs().max()


@torch.no_grad()
def test_later_mass_is_what_later_queries_give():
    model, ids = tiny(), tokens(1, 120)
    seen = []
    heads = heads_for(model)
    places = torch.tensor([60, 70, 71, 110])
    with lococo.attach(model, heads, num_slots=40, chunk_size=16) as slots:
        teacher = teach(slots, model, ids, torch.arange(56, 119))
        cache = slots.new_cache()

        def watch(layer_idx, entries, num_slots):
            if layer_idx == 0 and not seen:
                seen.append((entries, later_mass(teacher, layer_idx, entries, seen=56, places=places)))

        heads.on_compress = watch
        list(divergences(model, ids, cache, teacher))
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions[0]  # (1 h*g q s)
    model.set_attn_implementation("sdpa")
    entries, mass = seen[0]
    # Before the first compression the entries are the first 56 tokens.
    rows = maps[0][:, places, :56].unflatten(0, (2, -1))
    torch.testing.assert_close(mass[0], rows.mean((1, 2)), atol=1e-5, rtol=1e-4)
    assert len(entries) == 56


def test_retention_loss_lifts_what_will_be_attended_to():
    mass = torch.tensor([[[0.0, 0.9, 0.1, 0.0, 0.0]]])
    scores = torch.zeros(1, 1, 5, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=1.0)
    for _ in range(200):
        loss, _ = retention_loss(scores + torch.arange(5) * -1e-3, mass, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert set(scores[0, 0].topk(2).indices.tolist()) == {1, 2}
    _, lost = retention_loss(scores, mass, 2)
    assert lost == pytest.approx(0.0)
    _, lost = retention_loss(torch.arange(5.0)[None, None], mass, 2)
    assert lost == pytest.approx(1.0)
