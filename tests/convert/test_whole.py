"""A folder is complete or absent."""

from pathlib import Path

import pytest

from lococo.convert.whole import check_finished, whole_folder
from lococo.errors import ArgumentError


def test_it_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with whole_folder(target) as work:
        (work / "a").write_text("1", "utf-8")
        assert work.name == "new.half-converted"
        assert not target.exists()
        with pytest.raises(ArgumentError, match="was stopped there, or is still running"), whole_folder(target):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (target / "a").read_text("utf-8") == "1"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_takes_it_away(error: type[BaseException], tmp_path: Path) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "new") as work:
            (work / "a").write_text("1", "utf-8")
            raise error

    with pytest.raises(error):
        fill()
    assert not list(tmp_path.iterdir())


def test_a_target_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="new exists already"), whole_folder(tmp_path / "new"):
        (tmp_path / "new").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "none" / "new"):
        pass


def test_sources(tmp_path: Path) -> None:
    check_finished(tmp_path)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ArgumentError, match="file is a file; expected a folder"):
        check_finished(tmp_path / "file")
    with pytest.raises(ArgumentError, match="none does not exist"):
        check_finished(tmp_path / "none")
