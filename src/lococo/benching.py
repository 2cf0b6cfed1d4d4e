"""The verb that measures speed and memory: a plain function whose signature and docstring are its flags and help.

Nothing here imports torch before the verb runs.
"""

import sys

from lococo.atomic import write_atomically
from lococo.errors import ArgumentError, LococoError
from lococo.files import output_file
from lococo.options import ModelOptions, check_at_least_one, check_named, plot_file
from lococo.results import ABOUT, about_this_run, as_lines


def bench(
    *,
    lengths: list[int],
    compressor: list[str],
    num_slots: int = 512,
    chunk_size: int = 256,
    batch: tuple[int, ...] = (1,),
    repeats: int = 5,
    decode_tokens: int = 32,
    exact_memory: bool = False,
    compiled: bool = False,
    text: tuple[str, ...] = (),
    scored_tokens: int = 256,
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
            installed is left out; `python -m lococo.bench.peers` installs it. full:32768 reads no prompt that is
            longer, beside others that do.
        num_slots: Entries that survive a compression, per layer and key/value head.
        chunk_size: Tokens per forward pass.
        batch: Rows read side by side, one number or more; kvpress and llama.cpp read one.
        repeats: Rounds over all lengths and compressors, of which the medians are taken.
        decode_tokens: Tokens decoded after the prompt; up to four times as many where that takes less than two seconds.
        exact_memory: Count only what tensors take, not what the allocator keeps of it; slower, so not for speeds.
        compiled: Compile the decoding of those that read with slots.
        text: Texts whose beginnings are the prompts, another one in each round; how likely what follows is, in nats per
            token, is measured along. By default the prompt is the demo's text again and again, and nothing is scored.
        scored_tokens: Tokens behind a prompt of `text` that are scored.
        json: File for the results, one JSON object per line; replaced after every round by the medians so far.
        plot: Picture to draw of speed and memory by length, such as bench.svg.
        model: Which model reads.
    """
    check_at_least_one(
        num_slots=num_slots,
        chunk_size=chunk_size,
        repeats=repeats,
        decode_tokens=decode_tokens,
        scored_tokens=scored_tokens,
    )
    check_named(lengths=lengths, compressor=compressor, batch=batch)
    check_at_least_one(lengths=min(lengths), batch=min(batch))
    target = output_file(json)
    picture = plot_file(plot)
    if model.dtype == "auto":
        raise ArgumentError("expected --dtype float32, bfloat16 or float16, which speeds are compared in, got auto")
    from rich.console import Console

    from lococo.bench import measure
    from lococo.bench.peers import PEERS
    from lococo.bench.readers import Setting
    from lococo.progress import counting

    longest = {name: limit for name, limit in map(_with_limit, compressor) if _is_there(name)}
    if not longest:
        raise ArgumentError("nothing that was named can be measured here; name a compressor, such as mass-merge")
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
            compiled=compiled and name not in PEERS,
            batch=rows,
            scored_tokens=scored_tokens if text else 0,
            trust_remote_code=model.trust_remote_code,
        )
        for length in lengths
        for name, limit in longest.items()
        for rows in batch
        if (limit is None or length <= limit) and (rows == 1 or name not in PEERS or PEERS[name].batches)
    ]
    if alone := [name for name in longest if max(batch) > 1 and name in PEERS and not PEERS[name].batches]:
        print(f"{', '.join(alone)}: left out of batches, since they read one row at a time", file=sys.stderr)
    if not settings:
        limits = ", ".join(f"{name}:{limit}" for name, limit in longest.items() if limit is not None)
        raise ArgumentError(
            f"nothing is left to be measured of lengths {lengths} and batches {list(batch)}; "
            f"raise the limits ({limits or 'there are none'}), or name a compressor that reads batches"
        )
    longest_prompt = max(setting.length for setting in settings)
    trusted = {"trust_remote_code": model.trust_remote_code}
    if text:
        texts = measure.beginnings(model.model, text, longest_prompt + scored_tokens, **trusted)
    else:
        texts = [measure.prompt(model.model, longest_prompt, **trusted)]
    about = {ABOUT: about_this_run()}
    with counting("measurements") as progress:
        rows = measure.bench(
            settings,
            texts,
            repeats=repeats,
            progress=lambda done: progress(done, repeats * len(settings)),
            # What an interrupted run has measured is there, of fewer rounds.
            each_round=lambda rows: write_atomically(target, as_lines([row | about for row in rows]).encode()),
        )
    Console().print(measure.table(rows))
    if picture is not None:
        from lococo.eval import plots

        plots.save(plots.bench(rows), picture)
    if failed := [row for row in rows if "failed" in row]:
        said = "; ".join(dict.fromkeys(row["failed"] for row in failed))
        raise LococoError(
            f"{len(failed)} of {len(rows)} could not be measured to the end; the rest is in {json}: {said}"
        )


def _with_limit(name: str) -> tuple[str, int | None]:
    """Split what may be followed by a colon and the longest prompt that it is to read."""
    name, colon, limit = name.partition(":")
    if colon and not (limit.isdecimal() and int(limit)):
        raise ArgumentError(f"expected a number of tokens behind {name}:, got {limit!r}; write it as {name}:32768")
    return name, int(limit) if colon else None


def _is_there(compressor: str) -> bool:
    """Say on stderr that a peer cannot be measured here; refuse a name that nothing has."""
    from lococo.bench.peers import PEERS
    from lococo.compressors import check_known

    if compressor not in PEERS and compressor != "auto":
        check_known(compressor)
    absent = PEERS[compressor].absent() if compressor in PEERS else ""
    if absent:
        print(f"{compressor} is left out: {absent}", file=sys.stderr)
    return not absent
