from families import tiny
from transformers import DynamicCache

from lococo.eval import sharing
from lococo.eval.sharing import Wanted


def test_what_texts_begin_with_is_read_once(monkeypatch):
    read = []
    monkeypatch.setattr(sharing, "prefill", lambda model, ids, cache: read.append(ids.shape[1]))
    stem = list(range(100))
    texts = [[*stem, *range(50), end] for end in (7, 8)] + [[*stem, 99, *range(60), end] for end in (1, 2, 3)]
    texts += [[*stem, 120, 121], [5, 6]]
    wanted = [Wanted(ids, len(ids) - 1) for ids in texts]
    found = list(sharing.groups(tiny(), lambda: DynamicCache(config=tiny().config), wanted, batch_size=2))
    assert sorted(number for _, _, group in found for number in group) == list(range(7))
    for _, start, group in found:
        assert len({tuple(texts[number][:start]) for number in group}) == 1
    # The stem, what each of its two groups has in common, and what single texts have to themselves.
    assert sorted(read) == [1, 1, 50, 61, 100]


def test_a_text_with_little_to_share_does_not_keep_others_from_sharing(monkeypatch):
    read = []
    monkeypatch.setattr(sharing, "prefill", lambda model, ids, cache: read.append(ids.shape[1]))
    wanted = [Wanted([0, 5], 0), *(Wanted([0, *range(60), end], 61) for end in (1, 2)), Wanted([0, *range(20)], 20)]
    found = list(sharing.groups(tiny(), lambda: DynamicCache(config=tiny().config), wanted))
    assert sorted((start, group) for _, start, group in found) == [(0, [0]), (20, [3]), (61, [1]), (61, [2])]
    assert sorted(read) == [20, 61]


def test_texts_that_share_a_lot_share_it_where_others_share_little(monkeypatch):
    read = []
    monkeypatch.setattr(sharing, "prefill", lambda model, ids, cache: read.append(ids.shape[1]))
    texts = [[0, first, *range(60), end] for first in (1, 2) for end in (7, 8)] + [[3, *range(60), 7]]
    wanted = [Wanted(ids, len(ids) - 1) for ids in texts]
    found = list(sharing.groups(tiny(), lambda: DynamicCache(config=tiny().config), wanted))
    assert sorted((start, group) for _, start, group in found) == [(61, [4]), *((62, [n]) for n in range(4))]
    assert sorted(read) == [61, 62, 62]
