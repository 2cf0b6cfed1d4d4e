"""Pictures of results, made from their rows alone."""

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lococo.errors import ArgumentError
from lococo.eval.labels import with_rows
from lococo.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of text and lines in pictures for HTML, where it becomes the colour of the text around them.
INK = "#010203"

FULL = "full"

PANEL = (4.2, 3.2)

# Characters of a title's line, which a panel is as wide as.
TITLE_WIDTH = 42


def ablations(rows: Sequence[Row]) -> "Figure":
    """Draw one panel per subject, a point per value and number of slots, with 95 % intervals.

    Args:
        rows: Of `ablations.summary`.
    """

    def draw(panel: "Axes", subject: Any) -> None:
        same = [row for row in rows if row["subject"] == subject]
        names = list(dict.fromkeys(row["name"] for row in same))
        for shift, num_slots in enumerate(dict.fromkeys(row["num_slots"] for row in same)):
            drawn = [row for row in same if row["num_slots"] == num_slots]
            places = [names.index(row["name"]) + 0.1 * shift for row in drawn]
            _points(panel, places, drawn, "gap", ("low", "high"), fmt="o", label=f"{num_slots} slots")
        panel.set_xticks(range(len(names)), names, rotation=25, ha="right")
        panel.set_ylabel("gap, nats per token")
        panel.set_ylim(bottom=min(0, *(row["low"] for row in same)))

    return _panels(list(dict.fromkeys(row["subject"] for row in rows)), draw)


def perplexity(rows: Sequence[Row]) -> "Figure":
    """Draw one panel per domain: the gap by number of slots, a line per compressor, the full cache at 0."""

    def draw(panel: "Axes", domain: Any) -> None:
        same = [row for row in rows if row["domain"] == domain and row["compressor"] != FULL]
        for number, name in enumerate(dict.fromkeys(map(how_read, same))):
            drawn = sorted((row for row in same if how_read(row) == name), key=lambda row: row["num_slots"])
            places = [row["num_slots"] * 1.03**number for row in drawn]  # intervals beside each other
            _points(panel, places, drawn, "gap", ("gap_low", "gap_high"), fmt="o-", label=name)
        panel.axhline(0, color=INK, linestyle="--", linewidth=1, label="full cache")
        _slots_axis(panel, [row["num_slots"] for row in same])
        panel.set_ylabel("gap, nats per token")

    return _panels(list(dict.fromkeys(row["domain"] for row in rows)), draw)


def needle(rows: Sequence[Row]) -> "Figure":
    """Draw one panel per number of slots: the accuracy by length of text, a line per model and compressor."""
    name_of = _reader(rows)

    def draw(panel: "Axes", num_slots: Any) -> None:
        same = [row for row in rows if row["num_slots"] == num_slots]
        for name in dict.fromkeys(map(name_of, same)):
            drawn = sorted((row for row in same if name_of(row) == name), key=lambda row: row["length"])
            style = {"color": INK, "fmt": "o--"} if name == FULL else {"fmt": "o-"}
            places = [row["length"] for row in drawn]
            _points(panel, places, drawn, "accuracy", ("low", "high"), label=name, **style)
        panel.set_xlabel("tokens")
        panel.set_ylabel("numbers found")
        panel.set_ylim(-0.05, 1.05)

    return _panels(list(dict.fromkeys(row["num_slots"] for row in rows)), draw, name="{} slots")


def _reader(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Return what names the reader of a row: the compressor, after the model where there are several."""
    several = len({row.get("model") for row in rows}) > 1
    return lambda row: f"{row.get('model')}, {row['compressor']}" if several else str(row["compressor"])


def positions(rows: Sequence[Row]) -> "Figure":
    """Draw one panel per domain: nats per token by place in the text, a line per model and compressor.

    Args:
        rows: Of `positions.summary`.
    """
    name_of = _reader(rows)

    def draw(panel: "Axes", domain: Any) -> None:
        same = [row for row in rows if row["domain"] == domain]
        for number, name in enumerate(dict.fromkeys(map(name_of, same))):
            drawn = sorted((row for row in same if name_of(row) == name), key=lambda row: row["length"])
            style = {"color": INK, "fmt": "o--"} if name == FULL else {"fmt": "o-"}
            places = [row["length"] * 1.02**number for row in drawn]  # intervals beside each other
            _points(panel, places, drawn, "nll", ("low", "high"), label=name, **style)
        ends = sorted({row["length"] for row in same})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ends, [f"{end:,}" for end in ends], rotation=25, ha="right")
        panel.minorticks_off()
        panel.set_xlabel("tokens up to here, from the mark before")
        panel.set_ylabel("nats per token")

    return _panels(list(dict.fromkeys(row["domain"] for row in rows)), draw)


def suite(rows: Sequence[Row], name_of: Callable[[Row], str]) -> "Figure":
    """Draw one panel per task: the score by number of slots, a line per compressor, the full cache's as reference."""

    def draw(panel: "Axes", task: Any) -> None:
        same = [row for row in rows if name_of(row) == task]
        for name in dict.fromkeys(row["compressor"] for row in same):
            drawn = [row for row in same if row["compressor"] == name]
            if name == FULL:
                panel.axhline(drawn[0]["score"], color=INK, linestyle="--", linewidth=1, label="full cache")
                if drawn[0]["low"] is not None:
                    panel.axhspan(drawn[0]["low"], drawn[0]["high"], color=INK, alpha=0.08, linewidth=0)
                continue
            drawn.sort(key=lambda row: row["num_slots"])
            panel.plot([row["num_slots"] for row in drawn], [row["score"] for row in drawn], "o-", label=name)
        _slots_axis(panel, [row["num_slots"] for row in same if row["num_slots"] is not None])
        panel.set_ylabel(same[0]["metric"])

    return _panels(list(dict.fromkeys(map(name_of, rows))), draw)


def bench(rows: Sequence[Row]) -> "Figure":
    """Draw the medians of speed and memory by length of text, with the spread of the rounds."""
    figures = {
        "prefill_tokens_per_s": ("tokens read per second", 1),
        "decode_tokens_per_s": ("tokens decoded per second", 1),
        "time_to_first_token_s": ("seconds to the first token", 1),
        "kv_bytes": ("keys and values, MiB", 2**20),
        "peak_memory_bytes": ("peak memory beside the model, MiB", 2**20),
    }

    rows = [row for row in rows if row["prefill_tokens_per_s"] is not None]
    names = list(dict.fromkeys(map(with_rows, rows)))
    lengths = sorted({row["length"] for row in rows})

    def draw(panel: "Axes", figure: Any) -> None:
        words, unit = figures[figure]
        for name in names:
            drawn = sorted((row for row in rows if with_rows(row) == name), key=lambda row: row["length"])
            ends = [[end / unit for end in row["spread"][figure]] for row in drawn]
            scaled = [{"at": row[figure] / unit, "low": e[0], "high": e[1]} for row, e in zip(drawn, ends, strict=True)]
            places = [row["length"] * 1.03 ** names.index(name) for row in drawn]
            _points(panel, places, scaled, "at", ("low", "high"), fmt="o-", label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        panel.minorticks_off()
        panel.margins(x=0.3)
        panel.set_xlabel("tokens")
        panel.set_title(words)
        panel.set_yscale("log")

    return _panels(list(figures), draw)


def inside(rows: Sequence[Row]) -> "Figure":
    """Draw where attention goes, what slots are of, and how both change while a text is read.

    Args:
        rows: Of `inside.evaluate`.
    """
    panels: dict[str, Callable[[Axes], None]] = {
        "attention on the same tokens as with the full cache": partial(_by_layer, rows, "attention", "overlap"),
        "the full cache's attention to what is still held": partial(_by_layer, rows, "attention", "kept"),
        "divergence of attention on what is held, nats": partial(_by_layer, rows, "attention", "kl"),
        "mean age of slots, tokens": partial(_over_time, rows, "age"),
        "mean log_mass of slots": partial(_over_time, rows, "log_mass"),
        "slots from the first tokens of the text": partial(_over_time, rows, "of_the_first_chunk"),
        "entries held per layer": partial(_over_time, rows, "entries"),
        "nats per token": partial(_over_text, rows),
        "kinds of tokens: share in slots / share in the text": partial(_kinds, rows),
    }
    if heads := [row for row in rows if "weight" in row["layers"][0]]:
        panels["learned: logarithm of an entry's weight"] = partial(_by_layer, heads, "layers", "weight")
        panels["learned: added to log_mass"] = partial(_by_layer, heads, "layers", "gain")
    for row in rows:
        panels[f"{row['compressor']}: parts of the text in the slots"] = partial(_parts, row)
    return _panels(list(panels), lambda panel, title: panels[title](panel))


def _by_layer(rows: Sequence[Row], table: str, figure: str, panel: "Axes") -> None:
    """Draw the mean of the heads of each layer, with the least and the largest, or with the deviation."""
    for row in rows:
        values: dict[int, list[float]] = {}
        for each in row[table]:
            spread = each.get(f"{figure} deviation", 0.0)
            values.setdefault(each["layer"], []).extend([each[figure] - spread, each[figure] + spread])
        middle = [sum(some) / len(some) for some in values.values()]
        [line] = panel.plot(list(values), middle, "o-", markersize=3, label=row["compressor"])
        ends = [min(some) for some in values.values()], [max(some) for some in values.values()]
        panel.fill_between(list(values), *ends, color=line.get_color(), alpha=0.15, linewidth=0)
    panel.set_xlabel("layer")


def _over_time(rows: Sequence[Row], figure: str, panel: "Axes") -> None:
    for row in rows:
        drift = row["drift"]
        panel.plot([each["tokens"] for each in drift], [each[figure] for each in drift], label=row["compressor"])
    panel.set_xlabel("tokens read")
    panel.set_ylim(bottom=0)


def _over_text(rows: Sequence[Row], panel: "Axes") -> None:
    for row in rows:
        panel.plot([1024 * number for number in range(len(row["nll"]))], row["nll"], label=row["compressor"])
    panel.set_xlabel("tokens read")


def _kinds(rows: Sequence[Row], panel: "Axes") -> None:
    for number, row in enumerate(rows):
        shares = {kind: each["slots"] / each["text"] for kind, each in row["kinds"].items() if each["text"]}
        places = [place + number / (len(rows) + 1) for place in range(len(shares))]
        panel.barh(places, list(shares.values()), height=1 / (len(rows) + 1), label=row["compressor"])
        panel.set_yticks(range(len(shares)), list(shares))
    panel.axvline(1, color=INK, linewidth=1, linestyle="--")


def _parts(row: Row, panel: "Axes") -> None:
    """Draw the share of slots from each part of what was read so far, a column per compression."""
    columns = [each["parts"] for each in row["drift"]]
    ends = (row["drift"][0]["tokens"], row["drift"][-1]["tokens"], 0, 1)
    turned = [list(line) for line in zip(*columns, strict=True)]
    panel.imshow(turned, aspect="auto", origin="lower", extent=ends, vmin=0, cmap="viridis")
    panel.set_xlabel("tokens read")
    panel.set_ylabel("place in the text so far")


def how_read(row: Row) -> str:
    """Return the compressor of a row, with its budget where that is not its own."""
    budget = row.get("budget", "own")
    return str(row["compressor"]) if budget == "own" else f"{row['compressor']}, {budget} budget"


def _panels(keys: Sequence[Any], draw: Callable[["Axes", Any], None], name: str = "{}") -> "Figure":
    """Draw one panel per key, with a legend for all that are drawn alike."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("a plot needs matplotlib; install `lococo[eval]`") from error
    columns = 2 if len(keys) in (2, 4) else min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    legends = []
    for panel, key in zip(panels, keys, strict=False):
        draw(panel, key)
        if not panel.get_title():
            panel.set_title(textwrap.fill(name.format(key), TITLE_WIDTH))
        legends.append(panel.get_legend_handles_labels())
    if all(labels == legends[0][1] for _, labels in legends):
        figure.legend(*legends[0], loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    else:
        for panel, (_, labels) in zip(panels, legends, strict=False):
            if labels:
                panel.legend(fontsize="small", frameon=False)
    return figure


def _points(
    panel: "Axes", places: Sequence[float], rows: Sequence[Row], value: str, ends: tuple[str, str], **style: Any
) -> None:
    """Draw values with their intervals."""
    middle = [row[value] for row in rows]
    below = [max(0.0, row[value] - row[ends[0]]) for row in rows]
    above = [max(0.0, row[ends[1]] - row[value]) for row in rows]
    panel.errorbar(places, middle, yerr=[below, above], capsize=3, markersize=4, **style)


def _slots_axis(panel: "Axes", numbers: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted(set(numbers)), [str(number) for number in sorted(set(numbers))])
    panel.minorticks_off()
    panel.set_xlabel("slots per layer, mean")


def save(figure: "Figure", target: Path) -> None:
    """Write a picture; the suffix of the file decides its format, such as .svg or .png.

    Raises:
        ArgumentError: If matplotlib cannot write this format.
    """
    try:
        figure.savefig(target)
    except ValueError as error:
        raise ArgumentError(f"{target}: {error}; name a file such as plot.svg") from error


def svg(figure: "Figure", salt: str) -> str:
    """Return a picture as an element of HTML: as wide as there is room, in the colour of the text around it.

    Args:
        figure: Drawn with INK where it is to follow the text.
        salt: Keeps the names inside one picture apart from those inside others.
    """
    import matplotlib

    for panel in figure.axes:
        panel.patch.set_visible(False)
        for text in (panel.title, panel.xaxis.label, panel.yaxis.label):
            text.set_color(INK)
        panel.tick_params(which="both", colors=INK)
        for spine in panel.spines.values():
            spine.set_edgecolor(INK)
    for legend in [*figure.legends, *(panel.get_legend() for panel in figure.axes)]:
        for text in legend.get_texts() if legend is not None else ():
            text.set_color(INK)
    figure.patch.set_visible(False)
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    made = drawn.getvalue()
    made = made[made.index("<svg") :].replace(INK, "currentColor")
    made = re.sub(r"<metadata>.*?</metadata>", "", made, flags=re.DOTALL)
    width, _ = figure.get_size_inches()
    made = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="max-width: {width * 1.3:.1f}in"', made, count=1)
    made = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', made, count=1)
    # The names of axes and lines are the same in every picture; only what is referred to must stay.
    return re.sub(r'<g id="(?!m)[^"]*">', "<g>", made)
