"""Turns that are kept, and those that make room; and whose turn it is."""

import torch

from lococo.reader import prefill
from lococo.serve.conversations import Conversations, Turn
from lococo.serve.feed import Feed
from lococo.serve.jobs import Job, Layout
from lococo.serve.waiting import Waiting
from lococo.session import Session


def turn(session: Session) -> Turn:
    cache = session.slots.new_cache()
    prefill(session.model, torch.tensor([[5, 6]]), cache)
    return Turn(cache, [7])


def test_the_longest_beginning_that_is_kept_is_found(attached: Session) -> None:
    kept, one, two = Conversations(1 << 30), turn(attached), turn(attached)
    first, then = Layout("me", [1, 2]), Layout("me", [1, 2, 3, 4, 5])
    kept.keep(first.followed_by([3]), one)
    later = Layout("me", [1, 2, 3, 4, 5, 6, 7], [3, 6])
    assert kept.find(later.keys()) == (3, one)
    kept.keep(then.followed_by([6]), two)
    assert kept.find(later.keys()) == (6, two)
    for other in (
        Layout("you", later.ids, later.ends),
        Layout("me", [1, 2, 4, 4, 5, 6, 7], later.ends),
        Layout("me", later.ids),
    ):
        assert kept.find(other.keys()) is None


def test_those_unused_for_longest_make_room(attached: Session) -> None:
    turns = [turn(attached) for _ in range(4)]
    size = turns[0].cache.nbytes
    kept = Conversations(3 * size)
    for key, one in zip("abc", turns, strict=False):
        kept.keep(key, one)
    assert kept.find([(1, "a")]) is not None
    kept.keep("d", turns[3])
    assert [key for key in "abcd" if kept.find([(1, key)])] == ["a", "c", "d"]
    kept.keep("d", turns[0])
    assert (len(kept), kept.nbytes) == (3, 3 * size)
    none = Conversations(size - 1)
    none.keep("a", turns[0])
    assert (len(none), none.nbytes) == (0, 0)


def test_tenants_take_turns() -> None:
    waiting = Waiting()
    jobs = [Job(name, Feed(), lambda event: None, 0.0) for name in "aaabac"]
    for job in jobs:
        waiting.put(job)
    waiting.drop({jobs[1]})
    assert (len(waiting), "b" in waiting, "d" in waiting) == (5, True, False)
    assert [waiting.take().tenant for _ in range(5)] == ["a", "b", "c", "a", "a"]
    assert len(waiting) == 0
