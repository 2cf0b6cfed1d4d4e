import pytest
import torch
from test_base import entries_of

from lococo.compressors import Shape, make
from lococo.compressors.paper import PaperHeads
from lococo.errors import ArgumentError


def naive_weights(heads, entries, heavy, layer_idx):
    """The convolution as a loop over slots, entries and taps, normalised over the entries that are not heavy."""
    convolution = heads.convolutions[str(layer_idx)]
    weight, bias = convolution.weight, convolution.bias
    b, h, s, _ = entries.keys.shape
    kernel = weight.shape[-1]
    both = torch.cat([entries.keys, entries.values], -1)
    logits = torch.zeros(b, h, len(bias), s)
    for slot in range(len(bias)):
        for i in range(s):
            total = bias[slot].expand(b, h).clone()
            for tap in range(kernel):
                source = i + tap - kernel // 2
                if 0 <= source < s:
                    total = total + both[:, :, source] @ weight[slot, :, tap]
            logits[:, :, slot, i] = total
    logits = logits.exp() * ~heavy[:, :, None]
    return logits / logits.sum(-1, keepdim=True)


@torch.no_grad()
def test_the_convolution_equals_a_loop():
    entries = entries_of("lococo-paper", length=30, batch=1)
    heads = PaperHeads({1: 6}, 12, kernel_size=5)
    torch.nn.init.normal_(heads.convolutions["1"].bias)
    heavy = torch.zeros(1, 2, 30, dtype=torch.bool)
    heavy[..., [3, 9, 20]] = True
    torch.testing.assert_close(
        heads.weights(entries, heavy, 1), naive_weights(heads, entries, heavy, 1), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_at_n_zero_they_are_top_m_eviction():
    entries = entries_of("lococo-paper")
    slots = make("lococo-paper", Shape({1: 40}, 12)).compress(entries, 40, 1)
    evicted = make("chunk-mass", Shape({}, 12)).compress(entries, 40, 1)
    for name in ("keys", "values", "positions", "token_index", "log_mass"):
        torch.testing.assert_close(getattr(slots, name), getattr(evicted, name), atol=1e-6, rtol=0)


@pytest.mark.parametrize("unrotated", [False, True])
@torch.no_grad()
def test_mixtures_stand_between_the_heavy_hitters(unrotated):
    entries = entries_of("lococo-paper", length=30, batch=1)
    heads = PaperHeads({1: 8}, 12, kernel_size=3, mix=0.4, unrotated=unrotated)
    scores = torch.rand(1, 2, 30)
    kept = scores.topk(8).indices.sort().values
    slots = heads(entries, kept, scores, 1)
    keys = entries.unrotated_keys if unrotated else entries.keys
    for head in range(2):
        ranked = scores[0, head].argsort(descending=True).tolist()
        heavy, mixed = set(ranked[:4]), sorted(ranked[4:8])
        mask = torch.tensor([[[i in heavy for i in range(30)]]]).expand(1, 2, -1)
        weights = heads.weights(entries, mask, 1)[0, head]
        for slot, i in enumerate(kept[0, head].tolist()):
            if i in heavy:
                assert torch.equal(slots.keys[0, head, slot], entries.keys[0, head, i])
                continue
            row = 0.4 * weights[mixed.index(i)]
            row[i] += 0.6
            torch.testing.assert_close(slots.values[0, head, slot], row @ entries.values[0, head])
            position = row @ entries.positions[0, head] if unrotated else entries.positions[0, head, i]
            torch.testing.assert_close(slots.positions[0, head, slot], position)
            expected = row @ keys[0, head]
            if unrotated:
                expected = entries.rotary.rotate(expected[None, None, None], position[None, None, None])[0, 0, 0]
            torch.testing.assert_close(slots.keys[0, head, slot], expected, atol=1e-5, rtol=1e-4)


def test_the_papers_number_of_parameters():
    # Llama-2-7B: 32 layers, head_dim 128, 128 slots, all of them mixtures: 22.0 M weights in the convolutions.
    with torch.device("meta"):
        heads = PaperHeads(dict.fromkeys(range(32), 128), 128, heavy_share=0.0)
    weights = sum(convolution.weight.numel() for convolution in heads.convolutions.values())
    assert weights == 32 * 128 * 256 * 21 == 22_020_096


def test_a_fresh_start_is_not_saturated():
    entries = entries_of("lococo-paper", length=60)
    heads = PaperHeads({1: 40}, 12)
    heavy = torch.zeros(2, 2, 60, dtype=torch.bool)
    assert heads.weights(entries, heavy, 1).amax(-1).mean() < 0.3
    assert heads.convolutions["1"].bias.abs().sum() == 0


def test_another_number_of_slots_is_refused():
    with pytest.raises(ArgumentError, match="have 40 slots in layer 1, but 30"):
        make("lococo-paper", Shape({1: 40}, 12)).compress(entries_of("lococo-paper"), 30, 1)
    with pytest.raises(ArgumentError, match="odd kernel size"):
        PaperHeads({0: 4}, 12, kernel_size=4)
