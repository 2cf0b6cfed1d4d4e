import json

import pytest
import torch
from families import WINDOW, tiny

import lococo
from lococo.errors import ArgumentError, DocumentError
from lococo.eval import plots, positions
from lococo.eval.positions import documents_of, evaluate, summary
from lococo.eval.tables import positions_tables
from lococo.results import Results


def document(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(0, 128, (length,), generator=generator)]


@pytest.fixture
def data(tmp_path):
    for name, ids in (("a", document(500, 0)), ("b", document(230, 1)), ("c", document(60, 2))):
        (tmp_path / "texts" / "books").mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / "books" / f"{name}.txt").write_text(" ".join(f"w{i}" for i in ids))
    return tmp_path / "texts"


OPTIONS = {"num_slots": 40, "chunk_size": 16, "lengths": [400, 100, 200]}


@torch.no_grad()
def naive(ids, compressor):
    """The nll of every token but the first, read in one call."""
    batch = torch.tensor([ids])
    with lococo.attach(tiny(), compressor, num_slots=40, chunk_size=16) as slots:
        logits = tiny()(batch, past_key_values=slots.new_cache()).logits
    return -logits[0, :-1].log_softmax(-1).gather(1, batch[0, 1:, None])[:, 0].double()


@pytest.mark.parametrize("compressor", ["full", "mass-merge"])
def test_every_part_is_the_mean_of_its_tokens(tokenizer, data, compressor):
    measured = evaluate(tiny(), tokenizer, data=data, compressors=[compressor], **OPTIONS)
    rows = summary(json.loads(json.dumps(measured)))
    long, short = naive(document(500, 0)[:400], compressor), naive(document(230, 1)[:200], compressor)
    assert [(row["begin"], row["length"], row["documents"]) for row in rows] == [
        (0, 100, 2),
        (100, 200, 2),
        (200, 400, 1),
    ]
    # Token 0 is foreseen by nothing, so that score n is of token n + 1.
    parts = [[each[:99] for each in (long, short)], [each[99:199] for each in (long, short)], [long[199:]]]
    for row, part in zip(rows, parts, strict=True):
        assert row["nll"] == pytest.approx(torch.cat(part).mean().item(), rel=1e-5)
        assert row["tokens"] == sum(map(len, part))
    own = [[part["nll"] for part in row["parts"]] for row in measured]
    assert own[1] == pytest.approx([short[:99].mean().item(), short[99:].mean().item()], rel=1e-5)
    assert rows[2]["nll_so_far"] == pytest.approx(long.mean().item(), rel=1e-5)
    assert rows[1]["low"] <= rows[1]["nll"] <= rows[1]["high"]


@pytest.mark.parametrize("compressor", ["full", "mass-merge"])
def test_documents_side_by_side_are_scored_as_alone(tokenizer, tmp_path, compressor):
    for number, length in enumerate((450, 500, 230, 520)):
        (tmp_path / "books").mkdir(exist_ok=True)
        (tmp_path / "books" / f"{number}.txt").write_text(" ".join(f"w{i}" for i in document(length, number)))
    options = OPTIONS | {"data": tmp_path, "compressors": [compressor]}
    alone, together = (evaluate(tiny(), tokenizer, batch=batch, **options) for batch in (1, 2))
    assert [row["document"] for row in together] == [row["document"] for row in alone] == [0, 1, 2, 3]
    for one, other in zip(alone, together, strict=True):
        assert [part["nll"] for part in one["parts"]] == pytest.approx([p["nll"] for p in other["parts"]], rel=1e-5)
        assert one["parts"][-1]["tokens"] == other["parts"][-1]["tokens"]


def test_slots_read_on_where_the_full_cache_ends(tokenizer, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.txt").write_text(" ".join(f"w{i}" for i in document(2 * WINDOW, 0)))
    lengths = [WINDOW // 2, WINDOW, 2 * WINDOW]
    options = OPTIONS | {"lengths": lengths, "chunk_size": 64}
    rows = evaluate(tiny(), tokenizer, data=tmp_path, compressors=["full", "streaming-llm"], **options)
    read = {row["compressor"]: [part["length"] for part in row["parts"]] for row in rows}
    assert read == {"full": lengths[:2], "streaming-llm": lengths}


def test_what_was_measured_is_not_measured_again(tokenizer, data, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    options = OPTIONS | {"data": data}
    first = evaluate(tiny(), tokenizer, compressors=["mass-merge"], results=Results(file), **options)
    read = []
    score = positions.score
    monkeypatch.setattr(positions, "score", lambda *arguments: read.append(1) or score(*arguments))
    rows = evaluate(tiny(), tokenizer, compressors=["mass-merge", "h2o"], results=Results(file), **options)
    assert [row for row in rows if row["compressor"] == "mass-merge"] == first
    assert len(read) == 2  # the two documents, with h2o alone
    assert len(file.read_text().splitlines()) == len(rows) == 4


def test_the_longest_documents_are_taken(tokenizer, data):
    [taken] = documents_of(tokenizer, data, [100, 200, 400], 1)
    assert taken.ids == document(500, 0)[:400]
    assert [len(each.ids) for each in documents_of(tokenizer, data, [50, 200, 400], 9)] == [400, 200, 50]


def test_tables_and_plots_are_made_of_rows(tokenizer, data, tmp_path):
    rows = summary(evaluate(tiny(), tokenizer, data=data, compressors=["full", "h2o"], **OPTIONS))
    [table] = positions_tables(rows)
    assert [len(column._cells) for column in table.columns] == [2] * 5
    assert next(iter(table.columns[2].cells)) == f"{rows[0]['nll']:.4f}"
    [panel] = plots.positions(rows).axes
    lines, labels = panel.get_legend_handles_labels()
    drawn = lines[labels.index("h2o")].lines[0].get_ydata()
    assert list(drawn) == [row["nll"] for row in rows if row["compressor"] == "h2o"]


def test_bad_input(tokenizer, data):
    with pytest.raises(DocumentError, match="at least 600 tokens, the longest has 500; lower --lengths"):
        evaluate(tiny(), tokenizer, data=data, compressors=["h2o"], **OPTIONS | {"lengths": [100, 600]})
    with pytest.raises(ArgumentError, match="lengths of at least 2 tokens"):
        evaluate(tiny(), tokenizer, data=data, compressors=["h2o"], **OPTIONS | {"lengths": [1]})
