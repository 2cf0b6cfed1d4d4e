import pytest

from lococo.errors import ArgumentError
from lococo.eval.choice import TaskChoice


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (3, "expected a task as a name or a mapping"),
        ({"shots": 3}, "expected a task as a name or a mapping"),
        ({"name": "squad", "shot": 3}, "no setting shot; expected name, shots"),
        ({"name": "squad", "shots": None}, "shots must be at least 0, got None"),
        ({"name": "squad", "shots": True}, "shots must be at least 0, got True"),
        ({"name": "squad", "limit": 0}, "limit must be at least 1, got 0"),
        ({"name": "squad", "too_long": "no"}, "too_long must be one of refuse, truncate, middle"),
    ],
)
def test_a_recipe_is_checked(described, said):
    with pytest.raises(ArgumentError, match=said):
        TaskChoice.of(described)


def test_what_is_left_open_is_none():
    assert (
        TaskChoice.of({"name": "squad", "limit": None, "length": None}) == TaskChoice("squad") == TaskChoice.of("squad")
    )
