"""The verbs that tune a model itself, and bake the result: their signatures and docstrings are their flags and help.

Nothing here imports torch before a verb runs. Every verb checks its files first, then loads the model, then works.
"""

import json as jsonlib
from pathlib import Path
from typing import Literal

from lococo.options import ModelOptions
from lococo.train.extension import Extension
from lococo.training import TrainingOptions, carry_out
from lococo.tuned import RECORD
from lococo.verbs import human


def extend(*, output: str, recipe: Extension, options: TrainingOptions, model: ModelOptions) -> None:
    """Tune a model together with its heads on texts far longer than its window, in memory that does not grow with them.

    Args:
        output: Folder for what is tuned, which is a model to every other command; a tuning that was stopped goes on
            from the checkpoint in it.
        recipe: How the model is tuned.
        options: On what.
        model: Which model it is.
    """
    target = options.folder(output, "peft", file=RECORD, what="a tuned model")
    from lococo.train.extend import extend as run

    carry_out(run, recipe, target, options, model, base=model.model)


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
        folder: That `lococo extend` wrote, or the name of a tuned model that comes with lococo.
        output: Folder to make, which is complete or absent.
        dtype: Floating-point type of the weights; auto takes the one of the base.
        trust_remote_code: Run Python code that the base brings along.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    from lococo import tuned

    source, target = Path(folder).expanduser(), Path(output).expanduser()
    if not source.is_dir():
        source = tuned.shipped().get(folder, source)
    tuned.merge(source, target, dtype=dtype, trust_remote_code=trust_remote_code)
    print(f"saved as {target}", file=human(json))
    if json:
        print(jsonlib.dumps({"path": str(target)}))
