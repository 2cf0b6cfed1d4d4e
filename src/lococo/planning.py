"""The verb that tells what a model will need before anything of it is fetched; see `verbs.py`."""

import json as jsonlib
from pathlib import Path
from typing import Literal

from lococo.errors import ArgumentError
from lococo.options import check_at_least_one


def plan(
    *,
    model: str | None = None,
    context: str = "32k",
    num_slots: int = 512,
    chunk_size: int = 256,
    batch: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    compressor: str = "mass-merge",
    gpu: tuple[str, ...] = (),
    json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Tell from a model's config alone how much memory it takes to read with the full cache and with slots.

    Args:
        model: A hub id, a folder or a GGUF file; the embedded SmolLM2-135M-Instruct by default. Llama 2 and 3.1,
            ChatGLM3-6B-32k and Qwen3 are known by their hub ids without a network.
        context: Tokens per sequence, such as 4096, 128k or 1m.
        num_slots: Entries that survive a compression, per layer and key/value head.
        chunk_size: Tokens per forward pass, with the full cache as well.
        batch: Sequences that are read together.
        dtype: Floating-point type of the weights and the cache.
        compressor: Decides what is taken down beside keys and values.
        gpu: Devices, or their memory in GiB, to find the largest batch for; those in use by default.
        json: Print one JSON object on stdout.
        trust_remote_code: Run Python code that the model brings along.
    """
    check_at_least_one(num_slots=num_slots, chunk_size=chunk_size, batch=batch)
    if compressor == "full":
        raise ArgumentError("the full cache is always planned for; name the compressor that slots are made with")
    import torch
    from rich.console import Console

    from lococo.bench import plan as planned
    from lococo.models import load_config

    tokens = planned.tokens_of(context)
    devices = dict(map(planned.device_of, gpu)) if gpu else planned.DEVICES
    here = model is None or Path(model).expanduser().exists()
    config = None if here else planned.known_config(str(model))
    label = str(model)
    if config is None:
        config, label = load_config(model, trust_remote_code=trust_remote_code)
    made = planned.plan(
        config,
        name=label,
        context=tokens,
        num_slots=num_slots,
        chunk_size=chunk_size,
        batch=batch,
        dtype=getattr(torch, dtype),
        compressor=compressor,
        devices=devices,
        trust_remote_code=trust_remote_code,
    )
    if json:
        print(jsonlib.dumps(made.to_dict()))
    else:
        console = Console()
        for part in planned.tables(made):
            console.print(part, highlight=False, markup=False)
