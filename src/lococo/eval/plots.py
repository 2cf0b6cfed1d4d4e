"""Pictures of results, made from their rows alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lococo.errors import ArgumentError

Row = dict[str, Any]


def plot_ablations(rows: Sequence[Row], target: Path) -> None:
    """Draw one panel per subject, a point per value and number of slots, with 95 % intervals.

    Args:
        rows: Of `ablations.summary`.
        target: The picture; its suffix decides the format, such as .svg or .png.

    Raises:
        ArgumentError: If matplotlib is not installed, or cannot write this format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("a plot needs matplotlib; install `lococo[eval]`") from error
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    columns = min(3, len(subjects))
    lines = -(-len(subjects) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(subjects) :]:
        panel.set_visible(False)
    for panel, subject in zip(panels, subjects, strict=False):
        same = [row for row in rows if row["subject"] == subject]
        names = list(dict.fromkeys(row["name"] for row in same))
        for shift, num_slots in enumerate(dict.fromkeys(row["num_slots"] for row in same)):
            drawn = [row for row in same if row["num_slots"] == num_slots]
            panel.errorbar(
                [names.index(row["name"]) + 0.1 * shift for row in drawn],
                [row["gap"] for row in drawn],
                yerr=[
                    [max(0, row["gap"] - row["low"]) for row in drawn],
                    [max(0, row["high"] - row["gap"]) for row in drawn],
                ],
                fmt="o",
                capsize=3,
                label=f"{num_slots} slots",
            )
        panel.set_xticks(range(len(names)), names, rotation=25, ha="right")
        panel.set_title(subject)
        panel.set_ylabel("gap, nats per token")
        panel.set_ylim(bottom=min(0, *(row["low"] for row in same)))
        panel.legend(fontsize="small")
    try:
        figure.savefig(target)
    except ValueError as error:
        raise ArgumentError(f"{target}: {error}; name a file such as plot.svg") from error
