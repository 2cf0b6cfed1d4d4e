import torch
from test_base import entries_of

from lococo.compressors import Shape, make, selections


def test_streaming_llm_keeps_sinks_and_the_last():
    slots = make("streaming-llm", Shape({}, 12)).compress(entries_of("streaming-llm"), 20, 0)
    assert slots.token_index[0, 0].tolist() == [0, 1, 2, 3, *range(44, 60)]


def test_h2o_keeps_half_recent_and_half_by_accumulated_mass():
    entries = entries_of("h2o")
    kept = make("h2o", Shape({}, 12)).compress(entries, 20, 0).token_index[1, 1].tolist()
    assert kept[10:] == list(range(50, 60))
    heavy = entries.mass[1, 1, :50].topk(10).indices.sort().values
    assert kept[:10] == heavy.tolist()


def test_tova_is_one_choice_for_all_heads():
    entries = entries_of("tova")
    scores = selections.last_query_mass(entries)
    torch.testing.assert_close(scores[:, 0], entries.chunk_mass(last=1).mean(1))
    slots = make("tova", Shape({}, 12)).compress(entries, 20, 0)
    assert torch.equal(slots.token_index[:, 0], slots.token_index[:, 1])


def test_snapkv_pools_over_neighbours():
    entries = entries_of("snapkv")
    mass = entries.chunk_mass(last=32)
    scores = selections.window_mass(entries)
    for i in range(60):
        expected = mass[..., max(0, i - 2) : i + 3].amax(-1)
        torch.testing.assert_close(scores[..., i], expected)


def test_chunk_mass_and_look_ahead_differ_only_in_where_the_queries_stand():
    entries = entries_of("look-ahead")
    total = 2 * 16  # groups x queries
    torch.testing.assert_close(selections.chunk_mass(entries).sum(-1), torch.full((2, 2), float(total)))
    torch.testing.assert_close(selections.future_mass(entries).sum(-1), torch.full((2, 2), float(total)))
    assert (selections.chunk_mass(entries) - selections.future_mass(entries)).abs().max() > 1e-3
