"""Which layers need their slots, measured on windows of a corpus before anything is trained."""

from collections.abc import Callable

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from lococo.budgets import calibration_weights
from lococo.compressors import Compressor
from lococo.train.data import Corpus


def layer_weights(
    model: PreTrainedModel,
    compressor: Compressor | str,
    corpus: Corpus,
    *,
    num_slots: int,
    chunk_size: int,
    length: int,
    windows: int,
    batch: int = 1,
    groups: int | None = None,
    power: float = 1.0,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Measure how many slots each layer needs beside the others, the same in all processes; see `calibration_weights`.

    Args:
        model: Not attached.
        compressor: That shares slots out.
        corpus: Windows are drawn from it.
        num_slots: Of a group of layers while it is measured.
        chunk_size: Tokens per forward pass.
        length: Tokens of a window, more than num_slots + 2 * chunk_size; where documents are short it may have fewer.
        windows: How many.
        batch: Windows of the same length that are read side by side.
        groups: Neighbouring layers are measured together, in so many groups; None: each alone.
        power: Of its slots that a layer's loss falls with.
        seed: Of the windows: another one than that of the training draws others.
        say: Called with a line for people.
    """
    alike: dict[int, list[list[int]]] = {}
    for number in range(windows):
        ids = corpus.window(seed, number, length=length, least=num_slots + 2 * chunk_size)
        alike.setdefault(len(ids), []).append(ids)
    weights = calibration_weights(
        model,
        [torch.tensor(same[i : i + batch]) for same in alike.values() for i in range(0, len(same), batch)],
        compressor=compressor,
        num_slots=num_slots,
        chunk_size=chunk_size,
        groups=model.config.get_text_config(decoder=True).num_hidden_layers if groups is None else groups,
        power=power,
        progress=say,
    )
    # Processes that rounded otherwise must not share out otherwise.
    return list(broadcast_object_list(weights))
