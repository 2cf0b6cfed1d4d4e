"""What a report shows of each kind of results: words, a picture, tables. Made from the rows alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lococo.bench.roofline import share_of
from lococo.eval import ablations, metrics, plots
from lococo.eval import perplexity as nats
from lococo.eval import positions as places
from lococo.eval.plots import FULL, how_read
from lococo.eval.tables import task_name
from lococo.progress import mib
from lococo.results import Row

SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what stands there, and what it is sorted by."""

    text: str
    value: float | str


@dataclass(frozen=True)
class Sheet:
    """A table."""

    caption: str
    headings: list[str]
    lines: list[list[Cell]]


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        title: Its heading.
        words: What is measured.
        picture: Draws it; None where there is nothing to draw.
        sheets: Its tables.
        rank: Its place among the kinds of sections.
    """

    title: str
    words: str
    picture: Callable[[], Any] | None = None
    sheets: list[Sheet] = field(default_factory=list)
    rank: int = 0


def sections(rows: Sequence[Row], baseline: str = FULL) -> Iterator[Section]:
    """Yield the sections of the rows of one file.

    Args:
        rows: Of `lococo eval`, `ablate` or `bench`, in any mixture.
        baseline: The compressor that others are compared with, paired.
    """
    kinds: dict[str, tuple[Callable[[Row], bool], Callable[[list[Row], str], Section]]] = {
        "perplexity": (lambda row: row.get("task") == "perplexity" and "subject" not in row, _perplexity),
        "positions": (lambda row: row.get("task") == "positions", _positions),
        "needle": (lambda row: row.get("task") == "needle", _needle),
        "suite": (
            lambda row: {"task", "shots"} <= row.keys() and bool(row.keys() & {"scores", "skipped", "trained_on"}),
            _suite,
        ),
        "inside": (lambda row: row.get("task") == "inside", _inside),
        "ablations": (lambda row: "subject" in row, _ablations),
        "bench": (lambda row: "prefill_tokens_per_s" in row, _bench),
        "tuning": (lambda row: row.get("task") == "tuning-memory", _tuning),
        "far": (lambda row: row.get("task") == "far", _far),
    }
    for rank, (belongs, made) in enumerate(kinds.values()):
        if own := [row for row in rows if belongs(row)]:
            yield replace(made(own, baseline), rank=rank)


def _perplexity(rows: list[Row], baseline: str) -> Section:
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    full = [row for row in rows if row["compressor"] == FULL]
    sheets = []
    headings = ["compressor", *(f"{domain}" for domain in domains), "mean", f"minus {baseline}, paired"]
    for num_slots in sorted({row["num_slots"] for row in rows if row["num_slots"] is not None}):
        same = [row | {"compressor": how_read(row)} for row in rows if row["num_slots"] == num_slots]
        lines = []
        for name in dict.fromkeys(row["compressor"] for row in same):
            by_domain = {row["domain"]: row for row in same if row["compressor"] == name}
            if by_domain.keys() != set(domains):
                continue
            mean = sum(row["gap"] for row in by_domain.values()) / len(domains)
            cells = [_between(by_domain[d]["gap"], by_domain[d]["gap_low"], by_domain[d]["gap_high"]) for d in domains]
            other = [*full, *same]
            known = {row["compressor"] for row in other}
            paired = _between(*nats.difference(other, baseline, name)) if baseline in known else Cell("", "")
            lines.append([*_words(name), *cells, _number(mean), paired])
        sheets.append(Sheet(f"gap at {num_slots} slots, nats per token, with 95 % intervals", headings, lines))
    lines = [[*_words(row["domain"]), _number(row["nll"]), _whole(row["tokens"])] for row in full]
    sheets.append(Sheet("the full cache", ["domain", "nll, nats per token", "tokens that count"], lines))
    row = rows[0]
    words = (
        f"Nats per token that are lost against the full cache on the same tokens: windows of {row['max_length']:,} "
        f"tokens, chunks of {row['chunk_size']}, {len(row['window_nll'])} windows per domain; bootstrap over windows, "
        "some of which may be of one document."
    )
    return Section("What is lost", words, lambda: plots.perplexity(rows), sheets)


def _positions(rows: list[Row], baseline: str) -> Section:
    rows = places.summary(rows)
    ends = sorted({row["length"] for row in rows})
    sheets = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        cells = {(r["model"], r["compressor"], r["length"]): r for r in rows if r["domain"] == domain}
        parts, so_far = [], []
        for model, name in dict.fromkeys((model, name) for model, name, _ in cells):
            found = [cells.get((model, name, end)) for end in ends]
            about = _words(model, name)
            parts.append([*about, *(Cell("", "") if r is None else _of_documents(r) for r in found)])
            so_far.append([*about, *(Cell("", "") if r is None else _number(r["nll_so_far"]) for r in found)])
        headings = ["model", "compressor", *_ends_of(list(cells.values()), ends)]
        sheets.append(Sheet(f"{domain}: nats per token by place in the text", headings, parts))
        sheets.append(Sheet(f"{domain}: nats per token of all that was read so far", headings, so_far))
    words = (
        "Nats per token of each part of long documents, read from their beginning on: from the length before to the "
        "one at the column's head; then of the whole text up to there. The full cache reads no further than the "
        "window; 95 % intervals, bootstrap over documents."
    )
    return Section("What is foreseen far beyond the window", words, lambda: plots.positions(rows), sheets)


def _of_documents(row: Row) -> Cell:
    """Show a mean over documents with its interval, which one document does not have."""
    return _number(row["nll"]) if row["documents"] == 1 else _with_ends(row, "nll")


def _ends_of(rows: list[Row], ends: list[int]) -> list[str]:
    """Head the columns; where not all hold the same number of documents, with how many are as long."""
    counts = {end: sorted({row["documents"] for row in rows if row["length"] == end}) for end in ends}
    if len({count for some in counts.values() for count in some}) == 1:
        return [f"up to {end:,}" for end in ends]
    return [f"up to {end:,} (documents: {' or '.join(map(str, some))})" for end, some in counts.items()]


def _needle(rows: list[Row], baseline: str) -> Section:
    twins = {(row.get("model"), row["length"], row["num_slots"]): row for row in rows if row["compressor"] == baseline}
    lines = []
    for row in rows:
        twin = twins.get((row.get("model"), row["length"], row["num_slots"]))
        paired = Cell("", "") if twin is None else _paired_needle(row, twin)
        about = _words(row.get("model", ""), row["compressor"])
        found = _with_ends(row, "accuracy")
        lines.append([*about, *_wholes(row, "num_slots", "length"), found, paired, _whole(row["trials"])])
    headings = ["model", "compressor", "slots", "tokens", "found", f"minus {baseline}, paired", "trials"]
    words = "A key and a number hidden in real text at ten depths, asked for after it; 95 % intervals (Wilson)."
    sheets = [Sheet("numbers found", headings, lines)]
    return Section("What is found", words, lambda: plots.needle(rows), sheets)


def _paired_needle(row: Row, twin: Row) -> Cell:
    if len(row["correct"]) != len(twin["correct"]):
        return Cell("", "")
    trials = [str(number) for number in range(len(row["correct"]))]
    scores = {"correct": row["correct"]}, {"correct": twin["correct"]}
    return _between(*difference("correct", *scores, trials))


def _suite(rows: list[Row], baseline: str) -> Section:
    measured = [row for row in rows if "scores" in row]
    sheets = [_summary(measured, num_slots) for num_slots in _slots(measured)]
    if measured:
        sheets += [_behind(measured), _all_scores(measured, baseline)]
    if skipped := [row for row in rows if "skipped" in row]:
        lines = [_words(task_name(row), row["skipped"]) for row in skipped]
        sheets.append(Sheet("left out", ["task", "reason"], lines))
    if searched := [row for row in rows if "trained_on" in row]:
        lines = [[*_words(task_name(row), row["trained_on"]), *_wholes(row, "shared", "rows")] for row in searched]
        sheets.append(
            Sheet(
                "questions and examples that share 13 words in a row with texts trained on",
                ["task", "texts", "shared", "of"],
                lines,
            )
        )
    words = (
        "The same questions with the full cache and with every compressor; few-shot examples and documents are read "
        f"in slots. 95 % intervals by bootstrap over documents, where there are {metrics.FEWEST_DOCUMENTS} or more. "
        "Where a task (fits), as many slots in every layer hold its longest prompt whole, which makes them the full "
        "cache: it counts neither in the mean nor as behind."
    )
    if not searched and any(row["trained"] for row in measured):
        words += " Nobody searched the texts that heads were trained on for these questions (--trained-on)."
    return Section("Benchmarks", words, (lambda: plots.suite(measured, task_name)) if measured else None, sheets)


def _slots(rows: Sequence[Row]) -> list[int]:
    return sorted({row["num_slots"] for row in rows if row["num_slots"] is not None})


def _summary(rows: Sequence[Row], num_slots: int) -> Sheet:
    """Lay scores out, a line per task and a column per compressor."""
    full = {_of(row): row for row in rows if row["compressor"] == FULL}
    same = [row for row in rows if row["num_slots"] == num_slots]
    cells = {(_of(row), row["compressor"]): row for row in same}
    names = [FULL, *dict.fromkeys(row["compressor"] for row in same)]
    cells |= {(of, FULL): row for of, row in full.items()}
    lines = []
    for of, row in full.items():
        scores = [_number(cells[of, name]["score"]) if (of, name) in cells else Cell("", "") for name in names]
        about = f"{task_name(row)}, {row['metric']}" + (" (fits)" if _fits(row, num_slots) else "")
        lines.append([*_words(about), *scores, *_wholes(row, "questions", "truncated")])
    complete = [of for of, row in full.items() if all((of, n) in cells for n in names) and not _fits(row, num_slots)]
    if complete:
        means = [_number(sum(cells[of, name]["score"] for of in complete) / len(complete)) for name in names]
        lines.append([Cell(f"mean of {len(complete)} tasks", "~"), *means, Cell("", ""), Cell("", "")])
    return Sheet(f"scores at {num_slots} slots", ["task", *names, "questions", "cut"], lines)


def _fits(row: Row, num_slots: int) -> bool:
    """Whether as many slots in every layer hold the longest prompt of a task without compressing it."""
    return bool(row["prompt_tokens"]["max"] <= num_slots + row["chunk_size"])


def _behind(rows: Sequence[Row]) -> Sheet:
    """List where heads score less than a method without training."""
    lines = []
    heads = [row for row in rows if row["trained"] and not _fits(row, row["num_slots"])]
    for row in heads:
        rivals = [
            other
            for other in rows
            if _of(other) == _of(row) and other["num_slots"] == row["num_slots"] and not other["trained"]
        ]
        best = max(rivals, key=lambda other: float(other["score"]), default=None)
        if best is not None and best["score"] > row["score"]:
            apart = difference(row["metric"], row["scores"], best["scores"], row["documents"])
            mine = [*_words(row["compressor"], task_name(row)), _whole(row["num_slots"]), _number(row["score"])]
            lines.append([*mine, *_words(best["compressor"]), _number(best["score"]), _between(*apart)])
    headings = ["heads", "task", "slots", "score", "best without training", "its score", "difference, paired"]
    return Sheet(f"where heads are behind ({len(lines)} of {len(heads)})", headings, lines)


def _all_scores(rows: Sequence[Row], baseline: str) -> Sheet:
    twins = {(_of(row), row["num_slots"]): row for row in rows if row["compressor"] == baseline}
    lines = []
    for row in rows:
        twin = twins.get((_of(row), None if baseline == FULL else row["num_slots"]))
        paired = (
            Cell("", "")
            if twin is None or twin is row
            else _between(*difference(row["metric"], row["scores"], twin["scores"], row["documents"]))
        )
        slots = Cell("", 0) if row["num_slots"] is None else _whole(row["num_slots"])
        about = _words(task_name(row), row["metric"], row["compressor"])
        tokens = _whole(row["prompt_tokens"]["mean"])
        counts = [_whole(row["questions"]), tokens, _whole(row["truncated"])]
        lines.append([*about, slots, _with_ends(row, "score"), paired, *counts])
    headings = ["task", "metric", "compressor", "slots", "score", f"minus {baseline}, paired", "questions"]
    return Sheet("every score", [*headings, "tokens per prompt", "cut"], lines)


def _of(row: Row) -> tuple[object, ...]:
    return row["task"], row["shots"], row["length"], row["too_long"]


def difference(
    metric: str,
    scores: dict[str, list[float]],
    others: dict[str, list[float]],
    documents: Sequence[str],
    *,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return by how much one set of answers scores more than another, and the 95 % interval, paired by document."""

    def apart(which: Sequence[int] | None = None) -> float:
        return metrics.overall(metric, scores, which) - metrics.overall(metric, others, which)

    return (apart(), *metrics.interval(documents, apart, seed=seed))


def _ablations(rows: list[Row], baseline: str) -> Section:
    made = ablations.summary(rows)
    lines = [
        [*_words(row["subject"], row["name"]), *_wholes(row, "num_slots", "chunk_size"), _with_ends(row, "gap")]
        for row in made
    ]
    sheets = [Sheet("gap, nats per token, mean of the domains", ["subject", "value", "slots", "chunk", "gap"], lines)]
    words = "Heads of which one part was changed at a time, trained alike and measured on the same text."
    return Section("Ablations", words, lambda: plots.ablations(made), sheets)


def _inside(rows: list[Row], baseline: str) -> Section:
    def mean(row: Row, name: str) -> float:
        return sum(float(each[name]) for each in row["attention"]) / len(row["attention"])

    lines = [
        [
            *_words(row["compressor"]),
            *_wholes(row, "num_slots", "tokens"),
            *(_number(mean(row, name)) for name in ("overlap", "kept", "kl")),
            *(_number(row["drift"][-1][name]) for name in ("age", "log_mass")),
        ]
        for row in rows
    ]
    headings = ["compressor", "slots", "tokens", "overlap", "kept", "divergence", "mean age", "mean log_mass"]
    sheets = [Sheet("attention with slots and without, mean of layers and heads; slots at the end", headings, lines)]
    for row in rows:
        kept = [
            [*_words(repr(each["text"])), _whole(each["token"]), _number(each["share_of_heads"])]
            for each in row["favourites"]
        ]
        sheets.append(Sheet(f"tokens that {row['compressor']} keeps in most heads", ["text", "place", "heads"], kept))
    words = (
        "The last chunk's attention over slots beside its attention over the whole text: the overlap of the two, the "
        "share that the full cache gives to what is still held, and their divergence on that. Then what the slots are "
        "of, and how they age."
    )
    return Section("Inside the slots", words, lambda: plots.inside(rows), sheets)


def _bench(rows: list[Row], baseline: str) -> Section:
    scored = any(row.get("nll") is not None for row in rows)
    lines = [
        [
            *_words(row["compressor"], row["dtype"]),
            *_wholes(row | {"batch": row.get("batch", 1)}, "length", "num_slots", "chunk_size", "batch"),
            *([Cell("failed", -1)] + [Cell("", -1)] * 5 if row[SPEEDS[0]] is None else _costs(row)),
            *([_scored(row)] if scored else []),
        ]
        for row in rows
    ]
    speeds = ["read per second", "of roofline", "decoded per second", "of roofline"]
    headings = ["compressor", "dtype", "tokens", "slots", "chunk", "rows", *speeds, "keys and values", "peak"]
    headings += ["nats per token of what follows"] if scored else []
    words = (
        "Speed and memory, each measurement in a fresh process, compressors taking turns; medians and extremes. The "
        "roofline is what the machine's arithmetic (reading) and bandwidth (decoding) allow, measured in the same run."
    )
    sheets = [Sheet("what it costs", headings, lines)]
    return Section("What it costs", words, lambda: plots.bench(rows), sheets)


def _costs(row: Row) -> list[Cell]:
    speeds = [cell for name in SPEEDS for cell in (_spread(row, name), _of_roofline(row, name))]
    return speeds + [Cell(mib(row[name]), row[name]) for name in ("kv_bytes", "peak_memory_bytes")]


def _tuning(rows: list[Row], baseline: str) -> Section:
    lines = []
    for row in rows:
        about = [*_words(row["compressor"], row["device"], row["dtype"]), *_wholes(row, "length", "chunk_size")]
        peak, seconds = row["peak_memory_bytes"], row["seconds"]
        figures = (
            [Cell("failed", -1)] * 2 if peak is None else [Cell(mib(peak), peak), _number(row["length"] / seconds)]
        )
        lines.append([*about, *figures])
    headings = ["compressor", "device", "weights", "tokens", "chunk", "peak", "tokens per second"]
    words = (
        "One step of tuning at each length, each in a fresh process; the peak is what the step takes beside weights "
        "and Adam's moments."
    )
    return Section("What tuning costs", words, None, [Sheet("memory of tuning", headings, lines)])


def _far(rows: list[Row], baseline: str) -> Section:
    lines = []
    for row in rows:
        about = [
            *_words(row["model"] or "the default", row["compressor"], row["device"], row["dtype"]),
            *_wholes(row, "length", "num_slots", "chunk_size", "tokens", "rounds"),
        ]
        times = [
            cell
            for figure in ("read_s_per_token", "decode_s_per_token")
            for cell in (Cell(f"{1e3 * row[figure]:.2f}", row[figure]), _between(*row["ratio"][figure]))
        ]
        lines.append([*about, *times, Cell(mib(row["kv_bytes"]), row["kv_bytes"])])
    headings = ["model", "compressor", "device", "weights", "tokens before", "slots", "chunk", "tokens", "rounds"]
    headings += ["ms per token read", "times the shortest's", "ms per token decoded", "times the shortest's"]
    headings += ["keys and values"]
    words = (
        "The same tokens read on behind each length of one text, the lengths taking turns; medians of the rounds, and "
        "of the ratios to the run's shortest length within each round with 95 % intervals."
    )
    return Section("What a long text before costs", words, None, [Sheet("time per token", headings, lines)])


def _of_roofline(row: Row, name: str) -> Cell:
    limits = row.get("roofline", {})
    if limits.get(name) is None:
        return Cell("", -1)
    share = limits.get(share_of(name), row[name] / limits[name])
    return Cell(f"{share:.0%}", share)


def _scored(row: Row) -> Cell:
    return Cell("", -1) if row.get("nll") is None else _between(row["nll"], *row["spread"]["nll"])


def _spread(row: Row, name: str) -> Cell:
    low, high = row["spread"][name]
    return Cell(f"{row[name]:.1f} ({low:.1f} to {high:.1f})", row[name])


def _between(value: float, low: float | None, high: float | None) -> Cell:
    if low is None or high is None:
        return _number(value)
    return Cell(f"{value:.3f} ({low:.3f} to {high:.3f})", value)


def _with_ends(row: Row, name: str) -> Cell:
    return _between(row[name], row["low"], row["high"])


def _words(*texts: str) -> list[Cell]:
    return [Cell(text, text) for text in texts]


def _wholes(row: Row, *names: str) -> list[Cell]:
    return [_whole(row[name]) for name in names]


def _number(value: float) -> Cell:
    return Cell(f"{value:.3f}", value)


def _whole(value: int) -> Cell:
    return Cell(f"{value:,}", value)
