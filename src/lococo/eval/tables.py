"""Results of an evaluation as tables, made from its rows alone."""

from collections.abc import Sequence

from rich.table import Table

from lococo.eval.perplexity import Row, difference


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the gap per domain, and how the compressors compare to the best of them, paired by window."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    gaps = {(row["compressor"], row["domain"]): row for row in rows}
    names = [name for name in dict.fromkeys(row["compressor"] for row in rows) if name != "full"]
    mean = {name: sum(gaps[name, domain]["gap"] for domain in domains) / len(domains) for name in names}

    by_domain = Table("gap, nats per token", title="what is lost against the full cache on the same tokens")
    for heading in (*domains, "mean"):
        by_domain.add_column(heading, justify="right")
    by_domain.add_row("(full, nll)", *(f"{gaps['full', domain]['nll']:.4f}" for domain in domains), "")
    for name in sorted(names, key=mean.__getitem__):
        cells = [
            f"{gaps[name, d]['gap']:+.4f} [{gaps[name, d]['gap_low']:+.3f}, {gaps[name, d]['gap_high']:+.3f}]"
            for d in domains
        ]
        by_domain.add_row(name, *cells, f"{mean[name]:+.4f}")
    if len(names) < 2:
        return [by_domain]
    best = min(names, key=mean.__getitem__)
    compared = Table("compressor", title=f"how much more is lost than with {best}; 95 % interval, paired by window")
    for heading in ("more lost", "from", "to"):
        compared.add_column(heading, justify="right")
    for name in sorted(names, key=mean.__getitem__)[1:]:
        compared.add_row(name, *(f"{value:+.4f}" for value in difference(rows, best, name)))
    return [by_domain, compared]


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Return the accuracy per length of text, with its 95 % interval."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    cells = {(row["compressor"], row["length"]): row for row in rows}
    made = Table("compressor", title="hidden numbers found; 95 % interval")
    for length in lengths:
        made.add_column(f"{length:,} tokens", justify="right")
    for name in dict.fromkeys(row["compressor"] for row in rows):
        found = [cells[name, length] for length in lengths]
        made.add_row(name, *(f"{row['accuracy']:.0%} [{row['low']:.0%}, {row['high']:.0%}]" for row in found))
    return made
