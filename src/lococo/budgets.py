"""How many slots each layer gets, at the same total memory.

Layers differ: in SmolLM2-135M half of what compression loses is lost in five of thirty layers (docs/log.md). A budget
is a list of slots per layer, of a given mean, for `attach(..., slots_per_layer=...)`.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.atomic import write_atomically
from lococo.attachment import attach, slot_layer_indices, window_of
from lococo.cached import cache_folder
from lococo.compressors import Compressor
from lococo.documents import demo_text
from lococo.errors import ArgumentError
from lococo.reader import read
from lococo.shares import shares
from lococo.tokenization import encode_stream

BUDGETS = ("own", "uniform", "pyramid", "calibrated")

# Layers are measured in so many groups, over so many tokens: about a minute for SmolLM2-135M on two cores.
GROUPS = 6
CALIBRATION_TOKENS = 2048

# Tokens whose predictions are compared: the whole vocabulary of every token would not fit in memory.
COMPARED_EVERY = 4


def slots_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    budget: str,
    *,
    compressor: str,
    num_slots: int,
    chunk_size: int,
    progress: Callable[[str], None] | None = None,
) -> list[int]:
    """Return the number of slots of each layer that holds slots.

    Args:
        model: Not attached.
        tokenizer: Encodes the text that calibration reads.
        budget: "own", what the compressor brings along, or else uniform; "uniform"; "pyramid", more to the lower
            layers (arXiv 2406.02069); or "calibrated", measured once on a short text for this model, compressor and
            number of slots, and kept in the cache folder.
        compressor: Name of the compressor.
        num_slots: Mean over the layers.
        chunk_size: Tokens per forward pass.
        progress: Called with a line for each group of layers that is measured.

    Raises:
        ArgumentError: If the budget is unknown.
    """
    layers = len(slot_layer_indices(model))
    if budget == "own":
        return attach(model, compressor, num_slots=num_slots, chunk_size=chunk_size).slots_per_layer
    if budget == "uniform":
        return [num_slots] * layers
    most = None if (window := window_of(model)) is None else window - chunk_size
    if budget == "pyramid":
        return pyramid(layers, num_slots, least=_least(model, compressor, num_slots), most=most)
    if budget != "calibrated":
        raise ArgumentError(f"unknown budget {budget!r}; expected one of {', '.join(BUDGETS)}")
    key = attach(model, compressor, num_slots=num_slots, chunk_size=chunk_size).fingerprint()
    file = cache_folder() / "budgets" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or damaged: measured again
        return [int(slots) for slots in json.loads(file.read_text("utf-8"))]
    length = max(CALIBRATION_TOKENS, 2 * (num_slots + chunk_size))
    if most is not None and (length := min(length, most)) <= (least := _too_short(num_slots, chunk_size)):
        raise ArgumentError(
            f"calibration compares {num_slots} slots and chunks of {chunk_size} with the full cache on more than "
            f"{least} tokens, and the model's window has room for {most}; lower num_slots or chunk_size, or take "
            "another budget"
        )
    ids: list[int] = []
    for piece in encode_stream(tokenizer, [demo_text()]):
        ids += piece
        if len(ids) >= length:
            break
    budgets = calibrated(
        model,
        torch.tensor([ids[:length]]),
        compressor=compressor,
        num_slots=num_slots,
        chunk_size=chunk_size,
        most=most,
        progress=progress,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(budgets).encode())
    return budgets


def pyramid(layers: int, num_slots: int, least: int = 1, most: int | None = None) -> list[int]:
    """Return slots that fall evenly, beyond `least` in each, to a third of that in the last layer; see `shares`."""
    weights = [1.5 - i / max(1, layers - 1) for i in range(layers)]
    return shares(weights, num_slots, least, most)


def calibrated(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    compressor: str,
    num_slots: int,
    chunk_size: int,
    groups: int = GROUPS,
    most: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[int]:
    """Measure how much each group of layers needs its slots, and share them out.

    Args:
        model: Not attached.
        ids: A short text, (1 n), of more than num_slots + chunk_size and than two chunks and a few tokens.
        compressor: Name of the compressor.
        num_slots: Mean over the layers.
        chunk_size: Tokens per forward pass.
        groups: Neighbouring layers are measured together, in so many groups.
        most: Slots that a layer gets at most, see `shares`.
        progress: Called with a line for each group.

    Returns:
        Slots per layer.
    """
    weights = calibration_weights(
        model,
        [ids],
        compressor=compressor,
        num_slots=num_slots,
        chunk_size=chunk_size,
        groups=groups,
        progress=progress,
    )
    return shares(weights, num_slots, _least(model, compressor, num_slots), most)


def _too_short(num_slots: int, chunk_size: int) -> int:
    """Return how many tokens are not enough: some have to be behind a compression, and some be compared."""
    return max(num_slots + chunk_size, 2 * chunk_size + COMPARED_EVERY)


def calibration_weights(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    *,
    compressor: str | Compressor,
    num_slots: int,
    chunk_size: int,
    groups: int = GROUPS,
    power: float = 1.0,
    progress: Callable[[str], None] | None = None,
) -> list[float]:
    """Measure how sensitive each group of layers is; return what share of the slots is best for every layer.

    The sensitivity of a group is the divergence from the full cache's predictions when only that group is compressed.
    If a layer's loss falls with the inverse of its slots, its square root is the best share. A model in half precision
    is measured in float32, since rounding alone moves predictions by more than some layers do.

    Args:
        model: Not attached.
        windows: Texts, (b n) each, as long as `calibrated` needs them.
        compressor: See `calibrated`.
        num_slots: See `calibrated`.
        chunk_size: See `calibrated`.
        groups: See `calibrated`.
        power: A layer's loss falls with this power of its slots; sensitivity counts to the power of 1 / (1 + power).
        progress: See `calibrated`.
    """
    layers = len(slot_layer_indices(model))
    bounds = [round(layers * i / min(groups, layers)) for i in range(min(groups, layers) + 1)]
    shortest = min(ids.shape[1] for ids in windows)
    if shortest <= (least := _too_short(num_slots, chunk_size)):
        raise ArgumentError(
            f"calibration of {num_slots} slots and chunks of {chunk_size} needs a text of more than {least} tokens, "
            f"got {shortest}"
        )
    sums, count, texts = [0.0] * (len(bounds) - 1), 0, 0
    with _in_float32(model):
        for ids in windows:
            length = ids.shape[1]
            whole = _predictions(model, ids, compressor, [length] * layers, chunk_size)
            full = torch.cat([said.cpu() for said in whole], 1)  # of all tokens a GPU may have no room for
            count += full.shape[0] * full.shape[1]
            for group, (first, last) in enumerate(pairwise(bounds)):
                slots = [num_slots if first <= i < last else length for i in range(layers)]
                seen = 0
                for said in _predictions(model, ids, compressor, slots, chunk_size):
                    theirs = full[:, seen : seen + said.shape[1]].to(said.device)
                    sums[group] += (theirs.exp() * (theirs - said)).sum().item()
                    seen += said.shape[1]
            texts += ids.shape[0]
            if progress is not None and len(windows) > 1:
                all_texts = sum(each.shape[0] for each in windows)
                progress(f"{texts} of {all_texts} texts read with each group of layers compressed alone")
    sensitivity: list[float] = []
    for total, (first, last) in zip(sums, pairwise(bounds), strict=True):
        sensitivity += [max(total / count, 0.0) / (last - first)] * (last - first)
        if progress is not None:
            which = f"layer {first}" if last - first == 1 else f"layers {first} to {last - 1}"
            progress(f"{which}: {total / count:.5f} nats from the full cache")
    return [value ** (1 / (1 + power)) for value in sensitivity] if sum(sensitivity) > 0 else [1.0] * layers


@contextlib.contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model's weights in float32 for a while; buffers, such as RoPE's frequencies, are left alone."""
    before = [
        (parameter, parameter.dtype)
        for parameter in model.parameters()
        if parameter.is_floating_point() and not is_traceable_wrapper_subclass(parameter)  # not quantised
    ]
    try:
        for parameter, _ in before:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in before:
            parameter.data = parameter.data.to(dtype)


def _least(model: PreTrainedModel, compressor: str, num_slots: int) -> int:
    """Return the smallest number of slots that a layer can be given."""
    attached = attach(model, compressor, num_slots=num_slots, chunk_size=1)
    return 1 if attached.compressor is None else attached.compressor.min_slots()


@torch.no_grad()
def _predictions(
    model: PreTrainedModel, ids: Tensor, compressor: str | Compressor, slots_per_layer: list[int], chunk_size: int
) -> Iterator[Tensor]:
    """Yield the predictions after every few tokens of what follows the first two chunks, piece by piece, (b k v)."""
    seen = 0
    with attach(model, compressor, chunk_size=chunk_size, slots_per_layer=slots_per_layer) as slots:
        for piece in read(model, ids, slots.new_cache(), all_logits=True):
            tokens = torch.arange(seen, seen + piece.ids.shape[1])
            seen += len(tokens)
            compared = (tokens >= 2 * chunk_size) & (tokens % COMPARED_EVERY == 0)
            yield piece.logits[:, compared].float().log_softmax(-1)
