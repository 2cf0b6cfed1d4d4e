import contextlib
import json

import pytest
import torch
from families import tiny
from transformers import DynamicCache

from lococo.corpora import domains
from lococo.errors import ArgumentError, DocumentError
from lococo.eval.perplexity import difference, evaluate, interval
from lococo.results import Results


def document(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(0, 128, (length,), generator=generator)]


def write(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(f"w{i}" for i in ids))


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "books" / "a.txt", document(250, 0))
    write(tmp_path / "books" / "b.txt", document(130, 1))
    write(tmp_path / "books" / "SOURCE.txt", document(300, 9))
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in document(length, length))}) for length in (120, 30, 90)]
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "val.jsonl").write_text("\n".join(lines))
    (tmp_path / "web" / "train.jsonl").write_text("trained on")
    return tmp_path


@torch.no_grad()
def naive_nll(windows, chunk):
    """Mean over all tokens from the third chunk on, each window in one forward pass."""
    total, count = 0.0, 0
    for ids in windows:
        batch = torch.tensor([ids])
        logits = tiny()(batch, past_key_values=DynamicCache(config=tiny().config)).logits
        scores = logits[0, :-1].log_softmax(-1).gather(1, batch[0, 1:, None])[:, 0]
        total -= scores[2 * chunk - 1 :].sum().item()
        count += len(ids) - 2 * chunk
    return total / count, count


def test_full_cache_scores_every_token_from_the_third_chunk_on(tokenizer, data):
    rows = evaluate(
        tiny(), tokenizer, data=data, compressors=["mass-merge"], num_slots=[100], chunk_size=16, max_length=100
    )
    books = [document(250, 0)[:100], document(250, 0)[100:200], document(250, 0)[200:], document(130, 1)[:100]]
    web = [document(120, 120)[:100], document(90, 90)]
    expected = {"books": naive_nll(books, 16), "web": naive_nll(web, 16)}
    assert [(row["domain"], row["compressor"]) for row in rows] == [
        (domain, name) for domain in ("books", "web") for name in ("full", "mass-merge")
    ]
    for row in rows:
        nll, count = expected[row["domain"]]
        assert row["tokens"] == count
        # 100 slots hold every window, so that nothing is lost
        assert row["nll"] == pytest.approx(nll, abs=1e-4)
        assert row["gap"] == pytest.approx(0, abs=1e-5)
        assert {"task", "num_slots", "chunk_size", "max_length"} <= row.keys()


def test_windows_are_taken_from_one_document_in_turn(tokenizer, data):
    rows = evaluate(
        tiny(), tokenizer, data=data, compressors=["h2o"], num_slots=[40], chunk_size=16, max_length=100, max_windows=3
    )
    books = [document(250, 0)[:100], document(130, 1)[:100], document(250, 0)[100:200]]
    nll, count = naive_nll(books, 16)
    assert rows[0]["nll"] == pytest.approx(nll, abs=1e-4)
    assert rows[0]["window_tokens"] == [68, 68, 68]
    assert rows[1]["tokens"] == count == 204
    assert rows[1]["gap"] == pytest.approx(rows[1]["nll"] - rows[0]["nll"])
    assert rows[1]["gap_low"] <= rows[1]["gap"] <= rows[1]["gap_high"]


def test_several_numbers_of_slots_share_the_full_cache(tokenizer, data):
    options = {"data": data, "compressors": ["h2o", "look-ahead"], "chunk_size": 16, "max_length": 100}
    rows = evaluate(tiny(), tokenizer, num_slots=[40, 24], **options)
    assert [(row["compressor"], row["num_slots"]) for row in rows if row["domain"] == "web"] == [
        ("full", None),
        ("h2o", 40),
        ("look-ahead", 40),
        ("h2o", 24),
        ("look-ahead", 24),
    ]
    alone = evaluate(tiny(), tokenizer, num_slots=[24], **options)
    same = [row for row in rows if row["num_slots"] in (None, 24)]
    assert [row["nll"] for row in alone] == [row["nll"] for row in same]
    assert [row["gap"] for row in alone] == [row["gap"] for row in same]


def test_intervals_are_paired():
    def row(name, nlls, domain="books"):
        return {"domain": domain, "compressor": name, "window_nll": nlls, "window_tokens": [100] * len(nlls)}

    # Windows differ by far more than the methods do.
    rows = [row("a", [1.0, 2.0, 3.0, 4.0]), row("b", [1.1, 2.1, 3.1, 4.1])]
    mean, low, high = difference(rows, "a", "b")
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    # Domains count the same, whatever they hold.
    rows += [row("a", [1.0], "code"), row("b", [1.3], "code")]
    assert difference(rows, "a", "b") == pytest.approx((0.2, 0.2, 0.2))
    low, high = interval([0.0, 1.0] * 50, [1] * 100)
    assert 0.38 < low < 0.44
    assert 0.56 < high < 0.62


def test_only_validation_text_is_taken(tokenizer, tmp_path):
    write(tmp_path / "code" / "train" / "a.txt", [1])
    write(tmp_path / "code" / "val" / "b.txt", [1])
    write(tmp_path / "plain" / "deep" / "c.txt", [1])
    (tmp_path / "empty").mkdir()
    found = {name: [path.name for path in files] for name, files in domains(tmp_path).items()}
    assert found == {"code": ["b.txt"], "plain": ["c.txt"]}


def test_bad_input_is_refused_before_anything_is_scored(tokenizer, data, tmp_path):
    def run(**options):
        options = {
            "data": data,
            "compressors": ["h2o"],
            "num_slots": [40],
            "chunk_size": 16,
            "max_length": 100,
        } | options
        return evaluate(tiny(), tokenizer, progress=lambda done, total: pytest.fail("scored"), **options)

    with pytest.raises(ArgumentError, match=r"unknown compressor 'h3o'.*'h2o'"):
        run(compressors=["h3o"])
    with pytest.raises(ArgumentError, match="windows of 32 tokens"):
        run(max_length=32)
    with pytest.raises(ArgumentError, match="max_windows"):
        run(max_windows=0)
    with pytest.raises(ArgumentError, match="longer than the 1024"):
        run(max_length=1025)
    with pytest.raises(DocumentError, match="no such folder"):
        run(data=tmp_path / "none")
    with pytest.raises(DocumentError, match="no subfolder"):
        run(data=data / "books")
    (data / "short").mkdir()
    write(data / "short" / "a.txt", document(20, 0))
    with pytest.raises(DocumentError, match=r"'short'.*more than 32 tokens"):
        run()
    (data / "short" / "b.jsonl").write_text('{"text": "w1"}\n{"txt": 1}\n')
    with pytest.raises(DocumentError, match=r"b\.jsonl, line 2"):
        run()
    (data / "short" / "b.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(DocumentError, match="to be a string, got int"):
        run()
    (data / "short" / "b.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DocumentError, match="not UTF-8"):
        run()


def test_blank_lines_empty_files_and_byte_order_marks_are_nothing_special(tokenizer, tmp_path):
    line = json.dumps({"text": " ".join(f"w{i}" for i in document(90, 90))})
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text(f"\ufeff{line}\n\n" + '{"text": "half \\ud83d"}\n\n', encoding="utf-8")
    (tmp_path / "web" / "b.txt").touch()
    rows = evaluate(
        tiny(), tokenizer, data=tmp_path, compressors=["h2o"], num_slots=[40], chunk_size=16, max_length=100
    )
    assert rows[0]["tokens"] == 90 - 32


def test_an_interrupted_run_goes_on_with_the_same_figures(tokenizer, data, tmp_path):
    def run(results, stop=None):
        def progress(done, total):
            if done == stop:
                raise KeyboardInterrupt
            seen.append((done, total))

        seen = []
        options = {"compressors": ["h2o", "mass-merge"], "num_slots": [40], "chunk_size": 16, "max_length": 100}
        with contextlib.suppress(KeyboardInterrupt):
            rows = evaluate(tiny(), tokenizer, data=data, results=results, progress=progress, **options)
            return rows, seen
        return None, seen

    expected, _ = run(None)
    assert run(Results(tmp_path / "rows.jsonl"), stop=10)[0] is None
    rows, seen = run(Results(tmp_path / "rows.jsonl"))
    assert rows == expected
    # Four windows of books for each of three, of which two were done, and two of the web for each.
    assert seen == [(done, 18) for done in range(9, 19)]
