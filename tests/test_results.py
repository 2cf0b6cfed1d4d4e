import contextlib
import json
import sys
from types import SimpleNamespace

import pytest

from lococo import results as module
from lococo.results import Results, about_this_run, results_file


@pytest.fixture(autouse=True)
def unsigned(monkeypatch):
    """Rows as they were made, without the command and the versions."""
    monkeypatch.setattr(module, "about_this_run", lambda: None)


def test_rows_say_which_command_made_them_but_not_where(monkeypatch, tmp_path):
    words = ["eval", "needle", "--data", str(tmp_path / "texts"), "--model", "owner/name", "--json=../a.jsonl", "a b"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lococo", *words])
    about = about_this_run()
    assert about["command"] == "lococo eval needle --data texts --model owner/name --json=a.jsonl 'a b'"
    main = SimpleNamespace(__spec__=SimpleNamespace(name="lococo.bench.tuning"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["tuning.py", "texts"])
    assert about_this_run()["command"] == "python -m lococo.bench.tuning texts"
    main.__spec__.name = "lococo.__main__"
    assert about_this_run()["command"] == "lococo texts"
    assert {"lococo", "torch", "transformers"} <= about["versions"].keys()
    monkeypatch.setattr(module, "about_this_run", lambda: about)
    with results_file(tmp_path / "rows.jsonl") as results:
        results.add({"a": 1})
        row = results.measured({"a": 2}, lambda: {})
    assert lines(tmp_path / "rows.jsonl") == [{"a": 1, "about": about}, row]
    assert row["about"] == about


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_take_the_place_of_the_target_when_all_are_there(tmp_path):
    target = tmp_path / "rows.jsonl"
    target.write_text("older")
    with results_file(target) as results:
        row = results.measured({"a": 1}, lambda: {"b": 2})
        assert target.read_text() == "older"
        assert lines(tmp_path / "rows.jsonl.partial") == [row] == [{"a": 1, "b": 2, "run": row["run"]}]
    assert lines(target) == [row]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("rows", [0, 1])
def test_an_interruption_keeps_the_older_result_and_what_was_done(rows, tmp_path):
    target = tmp_path / "rows.jsonl"
    target.write_text("older")
    with contextlib.suppress(KeyboardInterrupt), results_file(target) as results:
        for _ in range(rows):
            results.add({"a": 1})
        raise KeyboardInterrupt
    assert target.read_text() == "older"
    assert (tmp_path / "rows.jsonl.partial").exists() == bool(rows)


def test_what_was_measured_before_an_interruption_is_not_measured_again(tmp_path):
    target, partial, measured = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.partial", []

    def run(names, of, stop=None):
        with results_file(target) as results:
            for name in names:
                if name == stop:
                    raise KeyboardInterrupt
                results.measured({"name": name}, lambda name=name: {"seen": measured.append(name)}, of=of)
        return results.rows

    with contextlib.suppress(KeyboardInterrupt):
        run("abc", "weights", stop="c")
    with partial.open("a") as file:  # killed in the middle of a line
        file.write('{"name": "c", "se')
    assert [row["name"] for row in run("cab", "weights")] == ["c", "a", "b"]
    assert measured == ["a", "b", "c"]
    assert [row["name"] for row in lines(target)] == ["c", "a", "b"]
    # Nor is what a finished run has measured, until its file is gone.
    assert [row["name"] for row in run("da", "weights")] == ["d", "a"]
    assert measured == ["a", "b", "c", "d"]
    target.unlink()
    run("a", "weights")
    run("a", "other weights")
    assert measured == ["a", "b", "c", "d", "a", "a"]


def test_rows_of_other_weights_are_measured_again(tmp_path):
    file, measured = tmp_path / "rows.jsonl", []
    for of in ("these", "those", "these"):
        Results(file).measured({"a": 1}, lambda of=of: {"of": measured.append(of)}, of=of)
    assert measured == ["these", "those"]


def test_lines_that_are_damaged_are_measured_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    first = Results(file).measured({"a": 1}, lambda: {})
    file.write_text("nonsense\n3\n" + file.read_text())
    results = Results(file)
    assert results.measured({"a": 1}, lambda: pytest.fail("measured")) == first
    assert lines(file) == [first]


def test_the_same_settings_are_measured_once(tmp_path):
    results = Results(tmp_path / "rows.jsonl")
    first = results.measured({"a": 1}, lambda: {})
    assert results.measured({"a": 1}, lambda: pytest.fail("measured")) == first
    assert results.rows == [first, first]
    assert len(lines(tmp_path / "rows.jsonl")) == 1


def test_a_finished_run_leaves_what_another_one_has_measured(tmp_path):
    target, partial = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.partial"
    with contextlib.suppress(KeyboardInterrupt), results_file(target) as results:
        kept = results.measured({"a": 1}, lambda: {})
        raise KeyboardInterrupt
    with results_file(target) as results:
        results.measured({"a": 2}, lambda: {})
        # What goes by other names is not taken for what was measured.
        results.add(kept | {"name": "b"})
    assert lines(target) == results.rows == [{"a": 2, "run": results.rows[0]["run"]}, {"a": 1, "name": "b"}]
    assert lines(partial) == [kept]


def test_what_is_measured_as_a_whole_is_taken_over_as_a_whole(tmp_path):
    target = tmp_path / "rows.jsonl"
    with results_file(target) as results:
        results.together("key", 2, lambda: [{"a": 1}, {"a": 2}])
    with results_file(target) as results:
        results.together("key", 2, lambda: pytest.fail("measured again"))
        results.together("other", 1, lambda: [{"a": 3}])
    assert [json.loads(line)["a"] for line in target.read_text().splitlines()] == [1, 2, 3]
    # Of a run that was killed between them, only the first is there.
    target.write_text(target.read_text().splitlines()[0] + "\n")
    with results_file(target) as results:
        results.together("key", 2, lambda: [{"a": 4}, {"a": 5}])
    assert [row["a"] for row in results.rows] == [4, 5]


def test_what_a_later_run_does_not_ask_for_is_kept_beside(tmp_path):
    target, partial = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.partial"
    with results_file(target) as results:
        hours = [results.measured({"a": number}, lambda: {"b": 1}) for number in range(2)]
    with results_file(target) as results:
        results.add({"task": "race", "skipped": "no such file"})
    assert lines(partial) == hours
    with results_file(target) as results:
        for number in range(2):
            results.measured({"a": number}, lambda: pytest.fail("measured again"))
    assert lines(target) == hours
    assert not partial.exists()
