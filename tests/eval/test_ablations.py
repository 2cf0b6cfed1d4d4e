import shutil
from copy import deepcopy
from pathlib import Path

import pytest
from commands import refused
from families import tiny

from lococo.errors import ArgumentError, DocumentError
from lococo.eval import ablations, perplexity, plots
from lococo.results import Results, results_file

TABLE = """
base: {num_slots: [24], chunk_size: 16, length: 100, steps: 2, calibrate_at: [], learned_scores: false}
use: {num_slots: [24, 40], chunk_size: 16, max_length: 100, max_windows: 3}
rows:
  - {subject: kernel size, name: "5", recipe: {}}
  - {subject: kernel size, name: "1", recipe: {kernel_size: 1}}
  - {subject: objective, name: distillation, recipe: {}}
  - {subject: without training, name: h2o, compressor: h2o}
  - {subject: chunk size, name: "32", recipe: {}, use: {chunk_size: 32}}
"""


@pytest.fixture
def data(tmp_path):
    for domain in ("books", "code"):
        for part in ("train", "val"):
            folder = tmp_path / "data" / domain / part
            folder.mkdir(parents=True)
            for number in range(3):
                words = " ".join(f"w{(i * (number + 2)) % 128}" for i in range(400))
                (folder / f"{number}.txt").write_text(words)
    return tmp_path / "data"


def table_in(folder, text=TABLE):
    (folder / "table.yaml").write_text(text)
    return folder / "table.yaml"


def test_rows_are_trained_once_and_measured_where_they_say(tmp_path, data, tokenizer, monkeypatch):
    # Training freezes the model.
    rows, said, model = ablations.read_table(table_in(tmp_path)), [], deepcopy(tiny())

    def run():
        found = Results()
        ablations.run(rows, model, tokenizer, data=data, output=tmp_path / "out", results=found, say=said.append)
        return found.rows

    results = run()
    assert sum("training in" in line for line in said) == 2
    # Two domains, and two numbers of slots.
    assert len(results) == 5 * 4
    made = ablations.summary(results)
    found = {(row["subject"], row["name"], row["num_slots"]): row for row in made}
    assert found["kernel size", "5", 24]["gap"] == found["objective", "distillation", 24]["gap"]
    assert found["kernel size", "5", 24]["gap"] != found["kernel size", "1", 24]["gap"]
    assert found["chunk size", "32", 24]["chunk_size"] == 32
    for row in made:
        assert row["low"] <= row["gap"] <= row["high"]
        assert row["gap"] == pytest.approx(sum(row["by_domain"].values()) / 2)
    said.clear()
    with monkeypatch.context() as patched:
        patched.setattr(perplexity, "score", lambda *arguments: pytest.fail("measured again"))
        assert run() == results
    assert not any("training in" in line for line in said)
    # The rows alone are enough: the folder may be another machine's.
    shutil.rmtree(tmp_path / "out")
    said.clear()
    with results_file(tmp_path / "rows.jsonl") as found:
        found.together("unasked", 1, lambda: [{}])
        ablations.run(rows[:1], model, tokenizer, data=data, output=tmp_path / "out", results=found, say=said.append)
    shutil.rmtree(tmp_path / "out")
    with results_file(tmp_path / "rows.jsonl") as found:
        ablations.run(rows[:1], model, tokenizer, data=data, output=tmp_path / "out", results=found, say=said.append)
    assert sum("training in" in line for line in said) == 1
    assert len(found.rows) == 4
    plots.save(plots.ablations(made), tmp_path / "plot.svg")
    assert "kernel size" in (tmp_path / "plot.svg").read_text()
    with pytest.raises(ArgumentError, match=r"name a file such as plot\.svg"):
        plots.save(plots.ablations(made), tmp_path / "plot.nonsense")


def test_what_would_fail_after_hours_fails_at_once(tmp_path, data, tokenizer):
    def run(rows, texts):
        options = {
            "data": texts,
            "output": tmp_path / "out",
            "results": Results(),
            "say": lambda line: pytest.fail(line),
        }
        ablations.run(rows, tiny(), tokenizer, **options)

    rows = ablations.read_table(table_in(tmp_path, TABLE.replace("compressor: h2o", "compressor: h3o")))
    with pytest.raises(ArgumentError, match="unknown compressor 'h3o'"):
        run(rows, data)
    for row, message in (
        ("{subject: a, name: b, use: {num_slots: [8]}}", "a, b: its heads need at least 9 slots"),
        (
            "{subject: a, name: b, use: {max_length: 2000}}",
            "a, b: windows of 2000 tokens leave the model's own of 1024",
        ),
        ("{subject: a, name: b, recipe: {length: 3000}}", "a, b: windows of 3000 tokens leave the model's own of 1024"),
        ("{subject: a, name: b, recipe: {heads: lococo-paper}}", r"slots 24 in each of 4 layers, but .* slots 40"),
    ):
        rows = ablations.read_table(table_in(tmp_path, TABLE.partition("rows:")[0] + f"rows: [{row}]"))
        with pytest.raises(ArgumentError, match=message):
            run(rows, data)
    (tmp_path / "same" / "books").mkdir(parents=True)
    (tmp_path / "same" / "books" / "a.txt").write_text("w1 " * 300)
    with pytest.raises(DocumentError, match="trained and measured on the same files"):
        run(ablations.read_table(table_in(tmp_path)), tmp_path / "same")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: []", "has no rows"),
        ("rows: [{name: a}]", "'subject'"),
        ("rows: [{subject: a, name: b, recipe: {kernel: 3}}]", "a recipe has no kernel"),
        ("rows: [{subject: a, name: b, recipes: {}}]", "has recipes; expected use, and one of"),
        ("columns: 1", "columns"),
        ("rows: [", "expected base, use and rows"),
        ("", "the file holds None, not names with values"),
        ("rows: {a: 1}", "rows is no list of rows"),
        ("base:\nrows: [{subject: a, name: b}]", "base holds None"),
        ("rows: [{subject: a, name: b, recipe: }]", "a, b: recipe holds None"),
        ("rows: [{subject: a, name: b, use: {slots: 3}}]", "a, b: use has no slots"),
        ("base: {kernel: 3}\nrows: [{subject: a, name: b}]", "a recipe has no kernel"),
        ("rows: [{subject: a, name: b, use: {num_slots: 64}}]", "expected num_slots to be whole numbers in brackets"),
        ("rows: [{subject: a, name: b, use: {chunk_size: many}}]", "expected chunk_size to be a whole number"),
        ("rows: [{subject: a, name: b, use: {max_windows: 0}}]", "expected max_windows to be at least 1"),
        ("rows: [{subject: a, name: b, use: {max_length: 500}}]", "raise max_length"),
        ("rows: [{subject: a, name: b, use: {budget: unifrom}}]", "unknown budget 'unifrom'"),
        ("rows: [{subject: a, name: b, recipe: {learning_rate: 1e-3}}]", r"a finite number such as 0\.001, got '1e-3'"),
        ("rows: [{subject: a, name: b}, {subject: a, name: b, recipe: {depth: 2}}]", "two rows are called a, b"),
    ],
)
def test_tables_that_cannot_be(tmp_path, text, message):
    with pytest.raises(ArgumentError, match=message):
        ablations.read_table(table_in(tmp_path, text))


def test_a_number_of_slots_is_measured_once():
    assert ablations.Use(num_slots=(24, 40, 24)).num_slots == (24, 40)


@pytest.mark.parametrize(("output", "rows"), [("data/out", "rows.jsonl"), ("out", "data/rows.jsonl")])
def test_results_within_the_text_are_refused(tmp_path, data, capsys, output, rows):
    words = ["ablate", str(table_in(tmp_path)), "--data", str(data), "-o", str(tmp_path / output)]
    assert "whose files are the text; write elsewhere" in refused([*words, "--json", str(tmp_path / rows)], capsys)


def test_a_picture_of_unknown_kind_is_refused_before_training(tmp_path, data, capsys):
    words = ["ablate", str(table_in(tmp_path)), "--data", str(data), "-o", str(tmp_path / "out")]
    words += ["--json", str(tmp_path / "rows.jsonl"), "--plot", str(tmp_path / "plot.nonsense")]
    assert "name a file such as plot.svg" in refused(words, capsys)


def test_the_table_that_comes_with_the_project_can_be_read():
    rows = ablations.read_table(Path(__file__).parents[2] / "recipes" / "ablations.yaml")
    subjects = {row.subject for row in rows}
    assert {"kernel size", "objective", "log_mass", "layers of convolution", "slots trained at"} <= subjects
    # Every subject compares at least two values.
    assert all(sum(row.subject == subject for row in rows) > 1 for subject in subjects)
