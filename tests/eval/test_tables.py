import io

from rich.console import Console

from lococo.eval.tables import ablation_table, tables


def row(domain, name, gap, num_slots=64):
    nlls = [2.0 + gap, 3.0 + gap]
    return {
        "domain": domain,
        "compressor": name,
        "num_slots": None if name == "full" else num_slots,
        "nll": 2.5 + gap,
        "gap": gap,
        "gap_low": gap - 0.01,
        "gap_high": gap + 0.01,
        "window_nll": nlls,
        "window_tokens": [100, 100],
    }


def printed(*made):
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(*made)
    return console.export_text()


def test_gaps_are_ordered_and_compared_with_the_best():
    gaps = {"full": 0.0, "worse": 0.3, "best": 0.1}
    text = printed(*tables([row(domain, name, gap) for domain in ("books", "code") for name, gap in gaps.items()]))
    assert text.index("best") < text.index("worse")
    assert "+0.3000 [+0.290, +0.310]" in text
    assert "2.5000" in text
    compared = text[text.index("how much more") :]
    assert "than with best" in compared
    assert compared.count("+0.2000") == 3


def test_one_compressor_is_compared_with_nothing():
    assert "how much more" not in printed(*tables([row("books", "full", 0.0), row("books", "h2o", 0.2)]))


def test_every_number_of_slots_has_a_table_of_its_own():
    rows = [row("books", "full", 0.0)]
    rows += [row("books", name, gap + slots / 1000, slots) for slots in (64, 256) for name, gap in (("a", 0), ("b", 1))]
    text = " ".join(printed(*tables(rows)).split())
    assert text.index("same tokens, 64 slots") < text.index("than with a") < text.index("same tokens, 256 slots")
    assert "+0.0640" in text
    assert "+1.2560" in text


def test_an_ablation_has_a_column_per_number_of_slots():
    common = {"subject": "kernel size", "low": 0.0, "high": 0.2}
    rows = [{**common, "name": name, "num_slots": 64, "gap": gap} for name, gap in (("1", 0.11), ("3", 0.12))]
    text = printed(ablation_table([*rows, {**common, "name": "1", "num_slots": 256, "gap": 0.13}]))
    assert [text.count(cell) for cell in ("64 slots", "256 slots", "+0.1100", "+0.1200", "+0.1300")] == [1] * 5
