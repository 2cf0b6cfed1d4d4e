"""The verb that converts checkpoints of other layouts; see `verbs.py`."""

import json as jsonlib
from pathlib import Path
from typing import Literal

from lococo.errors import ArgumentError
from lococo.verbs import human


def convert_chatglm3(
    source: str,
    target: str,
    *,
    back: bool = False,
    family: Literal["auto", "chatglm2", "chatglm3", "glm-4"] = "auto",
    json: bool = False,
) -> None:
    """Convert ChatGLM2, ChatGLM3 and GLM-4-9B for transformers' own GLM classes, without remote code.

    Args:
        source: Folder with the checkpoint: config.json, safetensors and tokenizer.model.
        target: Folder to make, which is complete or absent.
        back: Make the checkpoint again, byte for byte, from a folder that was converted.
        family: Which of the three it is; auto reads it from the checkpoint's own files.
        json: Print one JSON object on stdout at the end, and everything else on stderr.
    """
    if back and family != "auto":
        raise ArgumentError(f"--family {family} is for converting, and --back knows the family; drop one of them")
    from lococo.convert import chatglm
    from lococo.progress import counting, mib

    folders = Path(source).expanduser(), Path(target).expanduser()
    with counting("MiB") as show:

        def progress(done: int, total: int) -> None:
            show(done >> 20, total >> 20)

        if back:
            made = chatglm.convert_back(*folders, progress=progress)
        else:
            made = chatglm.convert(*folders, family=family, progress=progress)
    kind = "ChatGLM" if back else "GLM"
    print(
        f"{made.shards} {'shard' if made.shards == 1 else 'shards'} of {made.family}, {mib(made.nbytes)}, "
        f"saved for {kind} in {made.path}",
        file=human(json),
    )
    if json:
        figures = {"path": str(made.path), "family": made.family, "shards": made.shards, "nbytes": made.nbytes}
        print(jsonlib.dumps(figures | {"config": made.config}))
