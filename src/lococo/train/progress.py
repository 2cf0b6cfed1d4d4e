"""What a training shows: a bar on a terminal, a line per few steps elsewhere, and TensorBoard's logs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lococo.errors import ArgumentError

Row = dict[str, Any]

# Steps between lines where stderr is no terminal.
LINE_EVERY = 10


@contextmanager
def steps(total: int, logs: Path | None) -> Iterator[tuple[Callable[[str], None], Callable[[Row], None]]]:
    """Show a training.

    Args:
        total: Steps.
        logs: Folder for TensorBoard, or None.

    Yields:
        A function that says a line, and one that takes a step's figures.
    """
    writer = None if logs is None else _writer(logs)
    console = Console(stderr=True, highlight=False)
    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} steps, {task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total, figures="")

        def after_step(row: Row) -> None:
            figures = f"{row['num_slots']} slots: loss {row['loss']:.4f}"
            bar.update(task, completed=row["step"], figures=f"{figures}, {row['tokens_per_second']:,.0f} tokens/s")
            if bar.disable and row["step"] % LINE_EVERY == 0:
                console.print(f"step {row['step']} of {total}, {figures}, {row['tokens_per_second']:,.0f} tokens/s")
            if writer is not None:
                writer.add_scalar(f"loss/{row['num_slots']}", row["loss"], row["step"])

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
