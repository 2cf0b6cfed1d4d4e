"""Results of an evaluation as tables, made from its rows alone."""

from collections.abc import Sequence

from rich.table import Table

from lococo.eval.perplexity import difference
from lococo.results import Row


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return, by number of slots, the gap per domain, and how compressors compare to the best, paired by window."""
    full = [row for row in rows if row["compressor"] == "full"]
    numbers = dict.fromkeys(row["num_slots"] for row in rows if row["compressor"] != "full")
    groups = [[row for row in rows if row["num_slots"] == slots and row["compressor"] != "full"] for slots in numbers]
    return [table for group in groups or [[]] for table in _tables([*full, *group])]


def _tables(rows: Sequence[Row]) -> list[Table]:
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    gaps = {(row["compressor"], row["domain"]): row for row in rows}
    names = [name for name in dict.fromkeys(row["compressor"] for row in rows) if name != "full"]
    mean = {name: sum(gaps[name, domain]["gap"] for domain in domains) / len(domains) for name in names}

    slots = f", {rows[-1]['num_slots']} slots" if names else ""
    by_domain = Table("gap, nats per token", title=f"what is lost against the full cache on the same tokens{slots}")
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


def positions_tables(rows: Sequence[Row]) -> list[Table]:
    """Return one table per domain: nats per token by place in the text, a line per model and compressor.

    Args:
        rows: Of `positions.summary`.
    """
    made = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        same = [row for row in rows if row["domain"] == domain]
        ends = sorted({row["length"] for row in same})
        cells = {(row["model"], row["compressor"], row["length"]): row for row in same}
        table = Table("model", "compressor", title=f"{domain}: nats per token up to so many tokens, from those before")
        for end in ends:
            table.add_column(f"{end:,}", justify="right")
        for model, name in dict.fromkeys((row["model"], row["compressor"]) for row in same):
            found = [cells.get((model, name, end)) for end in ends]
            table.add_row(model, name, *("" if row is None else f"{row['nll']:.4f}" for row in found))
        made.append(table)
    return made


def ablation_table(rows: Sequence[Row]) -> Table:
    """Return the mean gap of every row of a table of ablations, a column per number of slots.

    Args:
        rows: Of `ablations.summary`.
    """
    numbers = list(dict.fromkeys(row["num_slots"] for row in rows))
    made = Table("subject", "value", title="gap, nats per token, mean of the domains; 95 % interval")
    for num_slots in numbers:
        made.add_column(f"{num_slots} slots", justify="right")
    found = {(row["subject"], row["name"], row["num_slots"]): row for row in rows}
    for subject, name in dict.fromkeys((row["subject"], row["name"]) for row in rows):
        cells = [found.get((subject, name, num_slots)) for num_slots in numbers]
        texts = ["" if r is None else f"{r['gap']:+.4f} [{r['low']:+.3f}, {r['high']:+.3f}]" for r in cells]
        made.add_row(subject, name, *texts)
    return made


def suite_tables(rows: Sequence[Row]) -> list[Table]:
    """Return one table per number of slots, a line per task and a column per compressor, and what was left out."""
    measured = [row for row in rows if "score" in row]
    full = {_asked(row): row for row in measured if row["compressor"] == "full"}
    made = []
    for num_slots in dict.fromkeys(row["num_slots"] for row in measured if row["num_slots"] is not None):
        same = [row for row in measured if row["num_slots"] == num_slots]
        names = list(dict.fromkeys(row["compressor"] for row in same))
        cells = {(_asked(row), row["compressor"]): row for row in same}
        table = Table("task", title=f"score, {num_slots} slots; 95 % intervals are the full cache's")
        for heading in ("questions", "full", *names):
            table.add_column(heading, justify="right")
        for asked, row in full.items():
            scores = [f"{cells[asked, name]['score']:.3f}" if (asked, name) in cells else "" for name in names]
            cut = f" ({row['truncated']} cut)" if row["truncated"] else ""
            ends = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
            twin = f"{row['score']:.3f}{ends}"
            table.add_row(f"{task_name(row)}, {row['metric']}", f"{row['questions']}{cut}", twin, *scores)
        made.append(table)
    if left_out := [row for row in rows if "skipped" in row]:
        table = Table("task", "reason", title="left out")
        for row in left_out:
            table.add_row(task_name(row), row["skipped"])
        made.append(table)
    return made


def task_name(row: Row) -> str:
    """Return the name of a row's task, with the examples before each question and the most tokens of a prompt."""
    shots = f", {row['shots']} shots" if row["shots"] else ""
    length = f", {row['length']:,} tokens" if row["length"] else ""
    return f"{row['task']}{shots}{length}"


def _asked(row: Row) -> tuple[object, ...]:
    return row["task"], row["shots"], row["length"], row["too_long"]
