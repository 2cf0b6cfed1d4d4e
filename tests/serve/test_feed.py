"""Ids on their way between two threads."""

import threading
import time

from lococo.serve.feed import Feed


def test_ids_come_out_as_they_went_in() -> None:
    feed, told = Feed(limit=10), []
    feed.on_more = lambda: told.append(1)

    def bring() -> None:
        for start in range(0, 1000, 7):
            assert feed.put(list(range(start, min(1000, start + 7))))
        feed.close()

    thread = threading.Thread(target=bring)
    thread.start()
    taken: list[int] = []
    while not feed.empty:
        if feed.ready(5):
            assert feed._count() <= 10 + 7
            taken += feed.take(5)
        else:
            time.sleep(0)
    thread.join()
    assert taken == list(range(1000))
    assert len(told) == len(range(0, 1000, 7)) + 1


def test_closing_lets_go_of_whoever_brings_more() -> None:
    feed = Feed(limit=1)
    assert feed.put([1])
    went_on = []
    thread = threading.Thread(target=lambda: went_on.append(feed.put([2])))
    thread.start()
    feed.close()
    thread.join(10)
    assert went_on == [False]
    assert feed.ready(100)
    assert feed.take(100) == [1]
    assert feed.empty


def test_the_first_error_is_the_one_that_counts() -> None:
    feed = Feed([1])
    first = ValueError("first")
    feed.close(first)
    feed.close()
    feed.close(KeyError("second"))
    assert feed.error is first
