"""The verbs that tune a model itself, and bake the result: their signatures and docstrings are their flags and help.

Nothing here imports torch before a verb runs. Every verb checks its files first, then loads the model, then works.
"""

import json as jsonlib
from pathlib import Path
from typing import Literal

from lococo.files import training_folder
from lococo.options import ModelOptions, check_at_least_one, check_extra
from lococo.train.extension import Extension
from lococo.train.processes import first_process
from lococo.train.recipe import TRAINING_DOCUMENTS
from lococo.tuned import RECORD
from lococo.verbs import human


def extend(
    *,
    output: str,
    data: tuple[str, ...] = (),
    documents: int = TRAINING_DOCUMENTS,
    save_every: int = 20,
    logs: str | None = None,
    json: bool = False,
    recipe: Extension,
    model: ModelOptions,
) -> None:
    """Tune a model together with its heads on texts far longer than its window, in memory that does not grow with them.

    Args:
        output: Folder for what is tuned, which is a model to every other command; a tuning that was stopped goes on
            from the checkpoint in it.
        data: Folders of .txt or .jsonl files, their subfolders being domains, of which only the part named train is
            read; data sets of the hub such as hf:owner/name or hf:owner/name:subset; Python's own library by default.
        documents: Taken of each data set of the hub, at most.
        save_every: Steps between checkpoints.
        logs: Folder for TensorBoard's logs.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
        recipe: How the model is tuned.
        model: Which model it is.
    """
    check_at_least_one(save_every=save_every, documents=documents)
    target = training_folder(output, data, file=RECORD, what="a tuned model")
    check_extra("train", "accelerate", "peft", *(["datasets"] if any(s.startswith("hf:") for s in data) else []))
    from lococo.train.extend import extend as run
    from lococo.train.progress import final_table, steps

    loaded, tokenizer = model.load()
    folder = Path(logs).expanduser() if logs is not None and first_process() else None
    with steps(recipe.steps, folder, quiet=not first_process()) as (say, after_step):
        figures = run(
            loaded,
            tokenizer,
            recipe,
            target,
            base=model.model,
            data=data,
            documents=documents,
            save_every=save_every,
            say=say,
            after_step=after_step,
        )
    if not first_process():
        return
    from rich.console import Console

    Console(file=human(json)).print(final_table(figures))
    if json:
        print(jsonlib.dumps(figures))


def merge(
    folder: str,
    *,
    output: str,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
    json: bool = False,
) -> None:
    """Write a tuned model as an ordinary checkpoint, LoRA and norms in its weights, its heads beside them.

    Args:
        folder: That `lococo extend` wrote.
        output: Folder to make, which is complete or absent.
        dtype: Floating-point type of the weights; auto takes the one of the base.
        trust_remote_code: Run Python code that the base brings along.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    from lococo import tuned

    target = Path(output).expanduser()
    tuned.merge(Path(folder).expanduser(), target, dtype=dtype, trust_remote_code=trust_remote_code)
    print(f"saved as {target}", file=human(json))
    if json:
        print(jsonlib.dumps({"path": str(target)}))
