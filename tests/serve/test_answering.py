"""Stop strings, however the text is cut."""

import pytest

from lococo.serve.answering import StopText


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("stops", "text", "told"),
    [
        ((), "one two", "one two"),
        (("wo",), "one two three", "one t"),
        (("###",), "one ## two #### three", "one ## two "),
        (("three", "two"), "one two three", "one "),
        (("aab",), "aaaab", "aa"),
        (("twice",), "one two twi", "one two twi"),
        (("one",), "one", ""),
    ],
)
def test_text_ends_before_the_first_stop(stops: tuple[str, ...], text: str, told: str, size: int) -> None:
    stop, got = StopText(stops), []
    for start in range(0, len(text), size):
        if not stop.stopped:
            got.append(stop.push(text[start : start + size]))
    assert "".join([*got, stop.finish()]) == told
    assert stop.stopped == (told != text)


def test_nothing_is_held_back_longer_than_it_must_be() -> None:
    stop = StopText(("###",))
    assert [stop.push(piece) for piece in ("a#", "#", "b", "c")] == ["a", "", "##b", "c"]
