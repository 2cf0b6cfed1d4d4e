"""The verbs that train: plain functions whose signatures and docstrings are their flags and help.

Nothing here imports torch before a verb runs. Every verb checks its files first, then loads the model, then trains.
"""

import json as jsonlib
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lococo.errors import ArgumentError
from lococo.files import check_exists, output_of_texts, training_folder
from lococo.options import ModelOptions, check_at_least_one, check_extra, plot_file
from lococo.results import results_file
from lococo.train.processes import first_process, number_of_processes
from lococo.train.recipe import TRAINING_DOCUMENTS, Recipe
from lococo.verbs import human

if TYPE_CHECKING:
    from collections.abc import Callable

    from lococo.train.extension import Extension


@dataclass(frozen=True)
class TrainingOptions:
    """What a training reads, and what it leaves on its way.

    Attributes:
        data: Folders of .txt or .jsonl files, their subfolders being domains, of which only the part named train is
            read; data sets of the hub such as hf:owner/name or hf:owner/name:subset; Python's own library by default.
        documents: Taken of each data set of the hub, at most.
        save_every: Steps between checkpoints.
        logs: Folder for TensorBoard's logs.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """

    data: tuple[str, ...] = ()
    documents: int = TRAINING_DOCUMENTS
    save_every: int = 20
    logs: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        check_at_least_one(save_every=self.save_every, documents=self.documents)

    def folder(self, output: str, *packages: str, file: str, what: str) -> Path:
        """Return the folder to write, once it is known to be writable and the packages to be there.

        Raises:
            ArgumentError: If one of them is not.
        """
        target = training_folder(output, self.data, file=file, what=what)
        hub = any(source.startswith("hf:") for source in self.data)
        check_extra("train", "accelerate", *packages, *(["datasets"] if hub else []))
        return target


def train(*, output: str, recipe: Recipe, options: TrainingOptions, model: ModelOptions) -> None:
    """Train compression heads for a model whose own weights stay as they are.

    Args:
        output: Folder for the heads; a training that was stopped goes on from the checkpoint in it.
        recipe: How the heads are trained.
        options: On what.
        model: Which model they are for.
    """
    target = options.folder(output, file="config.json", what="heads")
    from lococo.train.run import train as run

    carry_out(run, recipe, target, options, model)


def carry_out(
    run: "Callable[..., dict[str, Any]]",
    recipe: "Recipe | Extension",
    target: Path,
    options: TrainingOptions,
    model: ModelOptions,
    **more: str | None,
) -> None:
    """Load the model, train, and show how far it is and what came of it.

    Args:
        run: Called with the model, its tokenizer, the recipe, the folder, and the rest by name; returns the figures.
        recipe: How to train.
        target: Folder to write.
        options: On what to train.
        model: What to load.
        **more: What else `run` takes.
    """
    from lococo.train.progress import final_table, steps

    # Each of several processes brings the model to a device of its own.
    loaded, tokenizer = (replace(model, device=None) if number_of_processes() > 1 else model).load()
    logs = Path(options.logs).expanduser() if options.logs is not None and first_process() else None
    with steps(recipe.steps, logs, quiet=not first_process()) as (say, after_step):
        figures = run(
            loaded,
            tokenizer,
            recipe,
            target,
            data=options.data,
            documents=options.documents,
            save_every=options.save_every,
            say=say,
            after_step=after_step,
            **more,
        )
    if not first_process():
        return
    from rich.console import Console

    if figures["held_out"]:
        Console(file=human(options.json)).print(final_table(figures))
    print(f"saved as {target}", file=human(options.json))
    if options.json:
        print(jsonlib.dumps(figures))


def ablate(table: str, *, data: str, output: str, json: str, plot: str | None = None, model: ModelOptions) -> None:
    """Train and measure a table of ablations: one part of the heads changed at a time, on the same text.

    Args:
        table: YAML with the common recipe, where heads are measured, and rows; see recipes/ablations.yaml.
        data: One subfolder per domain, of .txt or .jsonl files, with parts named train and val.
        output: Folder for the heads; what is done there already is not done again.
        json: File for the results, one JSON object per line; replaced once all are there.
        plot: Picture to draw of them, such as ablations.svg.
        model: Which model the heads are for.
    """
    path = Path(table).expanduser()
    check_exists(path, "a table of ablations in YAML")
    target = output_of_texts(data, json)
    picture = plot_file(plot)
    for written in (Path(output).expanduser(), target):
        # What is done is known by the text, and would not be once there is more of it.
        if written.resolve().is_relative_to(Path(data).expanduser().resolve()):
            raise ArgumentError(f"{written} lies in --data {data}, whose files are the text; write elsewhere")
    from rich.console import Console

    check_extra("train", "accelerate")
    from lococo.eval import ablations, plots
    from lococo.eval.tables import ablation_table

    rows = ablations.read_table(path)
    loaded, tokenizer = model.load()
    with results_file(target) as results:
        ablations.run(
            rows,
            loaded,
            tokenizer,
            data=Path(data).expanduser(),
            output=Path(output).expanduser(),
            results=results,
            say=partial(print, file=sys.stderr),
        )
    made = ablations.summary(results.rows)
    Console().print(ablation_table(made))
    if picture is not None:
        plots.save(plots.ablations(made), picture)
