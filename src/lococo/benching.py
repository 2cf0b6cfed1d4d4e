"""The verb that measures speed and memory: a plain function whose signature and docstring are its flags and help.

Nothing here imports torch before the verb runs.
"""

import sys

from lococo.errors import ArgumentError
from lococo.files import output_file
from lococo.options import ModelOptions, check_at_least_one, check_named, plot_file
from lococo.results import results_file


def bench(
    *,
    lengths: list[int],
    compressor: list[str],
    num_slots: int = 512,
    chunk_size: int = 256,
    repeats: int = 5,
    decode_tokens: int = 32,
    exact_memory: bool = False,
    compiled: bool = False,
    json: str,
    plot: str | None = None,
    model: ModelOptions,
) -> None:
    """Measure speed and memory of reading and decoding, compressors taking turns, each in a fresh process.

    Args:
        lengths: Tokens of the prompt, one number or more.
        compressor: Names to compare, one or more. Beside lococo's: full (transformers' own cache, the prompt in one
            forward pass), full-chunked, quantized-fp8, kvpress-snapkv, kvpress-expected-attention, llama.cpp,
            llama.cpp-q8, llama.cpp-q4_0 and llama.cpp-q4_0-q8 (8-bit keys and values; weights in Q4_0). What is not
            installed is left out; `python -m lococo.bench.peers` installs it.
        num_slots: Entries that survive a compression, per layer and key/value head.
        chunk_size: Tokens per forward pass.
        repeats: Rounds, of which the medians are taken.
        decode_tokens: Tokens decoded after the prompt.
        exact_memory: Count only what tensors take, not what the allocator keeps of it; slower, so not for speeds.
        compiled: Compile the decoding of those that read with slots.
        json: File for the results, one JSON object per line; replaced once all are there.
        plot: Picture to draw of speed and memory by length, such as bench.svg.
        model: Which model reads.
    """
    check_at_least_one(num_slots=num_slots, chunk_size=chunk_size, repeats=repeats, decode_tokens=decode_tokens)
    check_named(lengths=lengths, compressor=compressor)
    check_at_least_one(lengths=min(lengths))
    target = output_file(json)
    picture = plot_file(plot)
    from rich.console import Console

    from lococo.bench import measure
    from lococo.bench.readers import Setting
    from lococo.progress import beyond, counting

    compressor = [name for name in compressor if _is_there(name)]
    if not compressor:
        raise ArgumentError("nothing that was named can be measured here; name a compressor, such as mass-merge")
    ids = measure.prompt(model.model, max(lengths))
    with results_file(target) as results, counting("measurements") as progress:
        total = len(lengths) * repeats * len(compressor)
        for number, length in enumerate(lengths):
            settings = [
                Setting(
                    name,
                    length,
                    num_slots=num_slots,
                    chunk_size=chunk_size,
                    dtype=model.dtype,
                    device=model.device,
                    model=model.model,
                    decode_tokens=decode_tokens,
                    exact_memory=exact_memory,
                    compiled=compiled,
                )
                for name in compressor
            ]
            tell = beyond(progress, number * repeats * len(compressor), total)
            for row in measure.bench(settings, ids[:length], repeats=repeats, progress=tell):
                results.add(row)
    Console().print(measure.table(results.rows))
    if picture is not None:
        from lococo.eval import plots

        plots.save(plots.bench(results.rows), picture)


def _is_there(compressor: str) -> bool:
    """Say on stderr that a peer cannot be measured here."""
    from lococo.bench.peers import PEERS

    absent = PEERS[compressor].absent() if compressor in PEERS else ""
    if absent:
        print(f"{compressor} is left out: {absent}", file=sys.stderr)
    return not absent
