import io

from rich.console import Console

from lococo.eval.tables import tables


def row(domain, name, gap):
    nlls = [2.0 + gap, 3.0 + gap]
    return {
        "domain": domain,
        "compressor": name,
        "nll": 2.5 + gap,
        "gap": gap,
        "gap_low": gap - 0.01,
        "gap_high": gap + 0.01,
        "window_nll": nlls,
        "window_tokens": [100, 100],
    }


def printed(rows):
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(*tables(rows))
    return console.export_text()


def test_gaps_are_ordered_and_compared_with_the_best():
    gaps = {"full": 0.0, "worse": 0.3, "best": 0.1}
    text = printed([row(domain, name, gap) for domain in ("books", "code") for name, gap in gaps.items()])
    assert text.index("best") < text.index("worse")
    assert "+0.3000 [+0.290, +0.310]" in text
    assert "2.5000" in text
    compared = text[text.index("how much more") :]
    assert "than with best" in compared
    assert compared.count("+0.2000") == 3


def test_one_compressor_is_compared_with_nothing():
    assert "how much more" not in printed([row("books", "full", 0.0), row("books", "h2o", 0.2)])
