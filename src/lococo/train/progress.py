"""What a training shows: a bar on a terminal, a line per few steps elsewhere, and TensorBoard's logs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lococo.errors import ArgumentError

Row = dict[str, Any]

# Steps between lines where stderr is no terminal.
LINE_EVERY = 10


@contextmanager
def steps(
    total: int, logs: Path | None, *, quiet: bool = False
) -> Iterator[tuple[Callable[[str], None], Callable[[Row], None]]]:
    """Show a training.

    Args:
        total: Steps.
        logs: Folder for TensorBoard, or None.
        quiet: Say nothing, as all processes but one do.

    Yields:
        A function that says a line, and one that takes a step's figures.
    """
    writer = None if logs is None else _writer(logs)
    console = Console(stderr=True, highlight=False, quiet=quiet)
    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} steps, {task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total, figures="")

        held_out = ""

        def after_step(row: Row) -> None:
            nonlocal held_out
            if "held_out" in row:
                held_out = f", held out {row['held_out']:.4f}"
            figures = f"{row['num_slots']} slots: loss {row['loss']:.4f}{held_out}"
            bar.update(task, completed=row["step"], figures=f"{figures}, {row['tokens_per_second']:,.0f} tokens/s")
            if bar.disable and row["step"] % LINE_EVERY == 0:
                console.print(f"step {row['step']} of {total}, {figures}, {row['tokens_per_second']:,.0f} tokens/s")
            if writer is not None:
                writer.add_scalar(f"loss/{row['num_slots']}", row["loss"], row["step"])
                if "held_out" in row:
                    writer.add_scalar("loss/held_out", row["held_out"], row["step"])

        try:
            yield console.print, after_step
        finally:
            if writer is not None:
                writer.close()


def _writer(logs: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ArgumentError("--logs needs tensorboard; install `lococo[train]`") from error
    return SummaryWriter(logs)


def final_table(figures: Row) -> Table:
    """Return what the training has done to the loss on text that was kept apart, by number of slots.

    Args:
        figures: Of `run.train`.
    """
    matching = figures["recipe"].get("objective") == "attention"
    unit = "share of attention's energy" if matching else "nats per token"
    text = "held-out text" if figures["held_out_was_kept_apart"] else "the text that was trained on"
    made = Table("slots", "before", "after", "change", title=f"loss on {text}, {unit}")
    for num_slots, after in figures["held_out"].items():
        before = figures["held_out_before"][num_slots]
        made.add_row(num_slots, f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.0%}" if before else "")
    return made
