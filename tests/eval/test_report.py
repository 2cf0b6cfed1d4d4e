import html
import json
import re
from html.parser import HTMLParser

import pytest
from commands import refused

from lococo import cli
from lococo.errors import DocumentError
from lococo.eval import sections
from lococo.eval.report import report

pytest.importorskip("matplotlib")

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Nesting(HTMLParser):
    """Checks that every element that is opened is closed, and gathers what is referred to."""

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and not value.startswith("#"):
                self.outside.append(value)
            if name == "data-value":
                self.cells.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def score(compressor, num_slots, scores, task="squad", longest=120):
    return {
        "task": task,
        "shots": 0,
        "compressor": compressor,
        "num_slots": num_slots,
        "chunk_size": 32,
        "length": None,
        "too_long": "refuse",
        "trained": compressor == "lococo",
        "metric": "f1",
        "score": sum(scores) / len(scores),
        "low": min(scores),
        "high": max(scores),
        "questions": len(scores),
        "documents": [str(i) for i in range(len(scores))],
        "scores": {"f1": scores},
        "truncated": 0,
        "prompt_tokens": {"mean": 100, "max": longest},
        "about": {"command": "lococo eval suite --config <recipe>", "versions": {"lococo": "1"}},
    }


SUITE = [
    score("full", None, [1.0, 1.0, 0.0] * 2),
    score("h2o", 64, [1.0, 1.0, 0.0] * 2),
    score("lococo", 64, [0.0, 1.0, 0.0] * 2),
    {"task": "race", "shots": 0, "length": None, "skipped": "race: <no> such file"},
    {"task": "squad", "shots": 0, "length": None, "trained_on": "texts", "rows": 3, "shared": 1},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_report_is_well_formed_and_needs_nothing_beside_it(tmp_path):
    made = report([write(tmp_path / "suite.jsonl", SUITE)])
    parser = Nesting()
    parser.feed(made)
    assert parser.open == []
    assert parser.outside == []
    assert not re.search(r"url\(\s*['\"]?http|@import|<link|src=", made)
    assert "race: &lt;no&gt; such file" in made
    assert "lococo eval suite --config &lt;recipe&gt;" in made
    assert "prefers-color-scheme: dark" in made
    assert "currentColor" in made
    assert 'name="viewport"' in made
    assert made == report([tmp_path / "suite.jsonl"])


def test_a_report_in_markdown_has_the_same_tables(tmp_path):
    rows = [score("full", None, [1.0, 0.5]), score("h2o+<x>|drop", 32, [0.5, 0.5]), score("lococo", 32, [1.0, 0.0])]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["report", str(file), "-o", str(tmp_path / "a.md")]) == 0
    written = (tmp_path / "a.md").read_text()
    found = [part.strip().splitlines() for part in written.split("\n\n") if part.startswith("|")]
    sheets = [sheet for section in sections.sections(rows) for sheet in section.sheets]
    assert len(found) == len(sheets) > 1
    for sheet, (headings, rule, *lines) in zip(sheets, found, strict=True):
        assert f"**{sheet.caption}**" in written
        assert rule == "|" + "---|" * len(sheet.headings)
        shown = [
            [html.unescape(cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in [headings, *lines]
        ]
        plain = [[re.sub(r"\\(.)", r"\1", cell) for cell in line] for line in shown]
        assert plain == [sheet.headings, *([cell.text for cell in line] for line in sheet.lines)]


def test_the_results_in_the_docs_are_those_of_the_rows(request):
    root = request.config.rootpath
    assert report([root / "results"], form="md") == (root / "docs" / "results.md").read_text()


def test_the_report_says_where_heads_are_behind(tmp_path):
    [section] = sections.sections(SUITE)
    [sheet] = [sheet for sheet in section.sheets if sheet.caption.startswith("where heads are behind")]
    assert sheet.caption == "where heads are behind (1 of 1)"
    texts = [cell.text for cell in sheet.lines[0]]
    assert texts[:6] == ["lococo", "squad", "64", "0.333", "h2o", "0.667"]
    assert texts[6].startswith("-0.333 (")


def test_differences_are_paired_with_the_baseline_that_is_chosen():
    [section] = sections.sections(SUITE, "h2o")
    [sheet] = [sheet for sheet in section.sheets if sheet.caption == "every score"]
    paired = [line[5].text for line in sheet.lines]
    assert paired[1:] == ["", "-0.333 (-0.667 to 0.000)"]
    six = sections.difference("f1", {"f1": [0.5, 1] * 3}, {"f1": [0.25, 0.75] * 3}, list("abcdef"))
    assert six == pytest.approx((0.25, 0.25, 0.25))


def test_time_behind_long_texts_is_shown_with_its_ratio():
    about = {"task": "far", "model": None, "compressor": "auto", "device": "cpu", "dtype": "float32", "num_slots": 512}
    figures = {"read_s_per_token": 0.005, "decode_s_per_token": 0.1, "kv_bytes": 2**20, "tokens": 2048, "rounds": 15}
    ratio = {"read_s_per_token": [1.01, 0.99, 1.02], "decode_s_per_token": [1.0, None, None]}
    [section] = sections.sections([about | figures | {"length": 65536, "chunk_size": 512, "ratio": ratio}])
    [[model, *_, tokens, slots, chunk, more, rounds, read, read_ratio, decoded, decoded_ratio, kv]] = section.sheets[
        0
    ].lines
    assert [cell.text for cell in (model, tokens, slots, chunk)] == ["the default", "65,536", "512", "512"]
    assert [cell.text for cell in (more, rounds)] == ["2,048", "15"]
    assert [cell.text for cell in (read, read_ratio)] == ["5.00", "1.010 (0.990 to 1.020)"]
    assert [cell.text for cell in (decoded, decoded_ratio, kv)] == ["100.00", "1.000", "1.0 MiB"]


def test_few_documents_have_no_interval():
    assert sections.difference("f1", {"f1": [0.5, 1]}, {"f1": [0.25, 0.75]}, ["a", "b"]) == (0.25, None, None)
    [section] = sections.sections(
        [score(name, slots, [1.0, 0.0]) | {"low": None, "high": None} for name, slots in (("full", None), ("h2o", 64))]
    )
    [sheet] = [sheet for sheet in section.sheets if sheet.caption == "every score"]
    assert [line[4].text for line in sheet.lines] == ["0.500", "0.500"]
    assert section.picture is not None
    section.picture()


def test_what_fits_the_slots_counts_nowhere():
    short = [
        score("full", None, [1.0], "race", 96),
        score("h2o", 64, [1.0], "race", 96),
        score("lococo", 64, [0.0], "race", 96),
    ]
    [section] = sections.sections([*SUITE, *short])
    sheets = {sheet.caption.partition(" (")[0]: sheet for sheet in section.sheets}
    lines = [[cell.text for cell in line] for line in sheets["scores at 64 slots"].lines]
    assert [line[0] for line in lines] == ["squad, f1", "race, f1 (fits)", "mean of 1 tasks"]
    assert lines[2][1:4] == ["0.667", "0.667", "0.333"]
    assert len(sheets["where heads are behind"].lines) == 1


def test_a_report_says_that_nobody_looked_for_questions_in_what_was_trained_on():
    [searched] = sections.sections(SUITE)
    [unsearched] = sections.sections(SUITE[:3])
    assert "--trained-on" not in searched.words
    assert "--trained-on" in unsearched.words


def test_every_kind_of_results_of_this_project_has_its_section(request):
    results = request.config.rootpath / "results"
    kinds = ("bench-16k", "far-32k", "inside", "needle-32k", "perplexity-64", "positions-128k", "tuning")
    made = report([results / f"{kind}.jsonl" for kind in kinds])
    assert made.count("<svg") == 5  # time behind long texts and memory of tuning are tables alone
    parser = Nesting()
    parser.feed(made)
    assert parser.open == []
    for title in ("What is lost", "What is found", "What it costs"):
        assert f"<h2>{title} " in made
    # What stands in the rows stands in the tables.
    rows = [json.loads(line) for line in (results / "perplexity-64.jsonl").read_text().splitlines()]
    cells = {float(cell) for cell in parser.cells if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", cell)}
    assert {row["gap"] for row in rows if row["compressor"] != "full"} <= cells


def test_a_suite_without_any_data_still_has_a_report(tmp_path):
    made = report([write(tmp_path / "suite.jsonl", SUITE[3:4])])
    assert "race: &lt;no&gt; such file" in made
    assert "<svg" not in made


def test_pairs_without_training_are_rivals_and_not_heads():
    pair = score("h2o+mass-merge", 64, [1.0] * 6)
    [section] = sections.sections([*SUITE, pair])
    [sheet] = [sheet for sheet in section.sheets if sheet.caption.startswith("where heads are behind")]
    assert [cell.text for cell in sheet.lines[0]][4:6] == ["h2o+mass-merge", "1.000"]


def test_bad_results_are_named(tmp_path, capsys):
    with pytest.raises(DocumentError, match="no results in"):
        report([tmp_path])
    with pytest.raises(DocumentError, match="line 1: expected a row of results in JSON"):
        report([write(tmp_path / "list.jsonl", [[1]])])
    with pytest.raises(DocumentError, match="no rows of"):
        report([write(tmp_path / "other.jsonl", [{"a": 1}])])
    line = refused(["report", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "out.html")], capsys)
    assert "no results in" in line
    assert not (tmp_path / "out.html").exists()
    good = write(tmp_path / "suite.jsonl", SUITE)
    line = refused(["report", str(good), "-o", str(tmp_path / "out.html"), "--baseline", "h2"], capsys)
    assert "no result is of 'h2'; expected one of full, h2o, lococo; did you mean 'h2o'?" in line
    assert cli.main(["report", str(good), "-o", str(tmp_path / "out.html"), "--baseline", "h2o"]) == 0


def test_parts_that_were_not_read_are_empty_cells():
    same = {
        "task": "positions",
        "model": "m",
        "domain": "books",
        "num_slots": 8,
        "chunk_size": 4,
        "positions": "packed",
    }
    first = {"begin": 0, "length": 100, "tokens": 99, "nll": 2.0}
    second = {"begin": 100, "length": 200, "tokens": 100, "nll": 2.25}
    rows = [same | {"compressor": "full", "parts": [first]}, same | {"compressor": "h2o", "parts": [first, second]}]
    [section] = sections.sections(rows)
    assert [[cell.text for cell in line] for line in section.sheets[0].lines] == [
        ["m", "full", "2.000", ""],
        ["m", "h2o", "2.000", "2.250"],
    ]
    section.picture()
    assert section.sheets[0].headings[2:] == ["up to 100", "up to 200"]
    # One more document, which ends before: means of other documents do not stand beside each other unsaid.
    [section] = sections.sections([*rows, rows[0], rows[0] | {"compressor": "h2o"}])
    assert section.sheets[0].headings[2:] == ["up to 100 (documents: 2)", "up to 200 (documents: 1)"]
    assert [cell.text for cell in section.sheets[0].lines[1][2:]] == ["2.000 (2.000 to 2.000)", "2.250"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task": "needle"}, "a row lacks 'compressor'"),
        ({"task": "perplexity", "domain": "x"}, "a row lacks 'compressor'"),
        ({"task": "a", "shots": 0, "skipped": "x"}, "a row lacks 'length'"),
        ({"task": "inside", "about": 1}, "a row holds something else than was expected"),
    ],
)
def test_rows_that_lack_something_are_named_with_their_file(tmp_path, capsys, row, said):
    file = write(tmp_path / "odd.jsonl", [row])
    line = refused(["report", str(file), "-o", str(tmp_path / "out.html")], capsys)
    assert f"{file}: {said}" in line
    file.write_text("[" * 100_000)
    assert "odd.jsonl, line 1: expected a row" in refused(["report", str(file), "-o", str(tmp_path / "o.html")], capsys)


def test_the_mean_is_sorted_behind_the_tasks_of_whatever_name(tmp_path):
    made = report([write(tmp_path / "suite.jsonl", SUITE)])
    # Signs stand before letters in a locale's order, and "~" behind them in that of code points.
    assert 'data-value="~">mean of 1 tasks' in made
    assert "localeCompare" not in made
