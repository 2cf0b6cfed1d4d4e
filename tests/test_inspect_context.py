"""What inspect counts and draws, on hand-made layers."""

import xml.etree.ElementTree
from pathlib import Path

import pytest

from lococo.errors import ArgumentError
from lococo.inspect_context import Kept, blocks, head_of, svg
from lococo.storage import ContextInfo

# 12 tokens; one head keeps the first and the last three, the other the whole first third.
LAYER = Kept(3, [[0, 9, 10, 11], [0, 1, 2, 3]], [[2.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]], waiting=0)
INFO = ContextInfo(Path("a&b.safetensors"), "<model>", "mass-merge", [4], 8, "packed", 12, 1000)


def test_shares_count_the_kept_tokens_of_each_part() -> None:
    assert LAYER.shares(12, 3) == [5 / 8, 0, 3 / 8]
    assert LAYER.shares(12, 12) == [1, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0, 0.5, 0.5, 0.5]


def test_more_parts_than_tokens_leave_parts_empty() -> None:
    shares = Kept(0, [[0, 1, 2]], [[0.0, 0.0, 0.0]], 0).shares(3, 6)
    assert shares == [1, 0, 1, 0, 1, 0]


def test_favourites_are_those_of_most_heads_then_of_most_mass() -> None:
    assert LAYER.favourites() == [0, 10, 1, 2, 3, 9, 11]


def test_mean_log_mass() -> None:
    assert LAYER.mean_log_mass == pytest.approx(0.5)


def test_blocks_are_scaled_to_the_greatest_share_and_show_the_least() -> None:
    assert blocks([[0.0, 0.001, 0.25], [0.5, 0.375, 0.0]]) == [" ░▒", "█▓ "]


def test_a_head_is_picked_by_the_models_layer_index() -> None:
    assert head_of([LAYER], 3, 1).token_index == [[0, 1, 2, 3]]
    with pytest.raises(ArgumentError, match="no layer 0 with slots"):
        head_of([LAYER], 0, 0)
    with pytest.raises(ArgumentError, match="no key/value head -1 in layer 3; there are heads 0 to 1"):
        head_of([LAYER], 3, -1)


def test_the_picture_has_a_cell_per_part_that_is_kept_and_escapes_names() -> None:
    root = xml.etree.ElementTree.fromstring(svg([LAYER], INFO, 12))
    space = "{http://www.w3.org/2000/svg}"
    cells = [float(cell.get("fill-opacity", 0)) for cell in root.iter(f"{space}rect") if cell.get("fill-opacity")]
    assert cells == [1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    title = root.find(f"{space}title")
    assert title is not None
    assert title.text == "a&b.safetensors: what mass-merge keeps of 12 tokens (<model>)"
    assert "prefers-color-scheme:dark" in svg([LAYER], INFO, 12)
