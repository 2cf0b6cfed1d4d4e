"""Flags that several verbs of the command line share, one small group each.

Every field is a flag of the same name with dashes, and its line below is the flag's help.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lococo.errors import ArgumentError
from lococo.files import output_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelOptions:
    """Which model reads.

    Attributes:
        model: A hub id, a folder or a GGUF file; the embedded SmolLM2-135M-Instruct by default, and
            SmolLM2-135M-Instruct-32K is what it became by `lococo extend`.
        dtype: Floating-point type of the weights and the cache; auto takes the one they are stored in.
        device: Where to compute, such as cuda or cuda:1; the CPU by default.
        trust_remote_code: Run Python code that the model brings along.
    """

    model: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str | None = None
    trust_remote_code: bool = False

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the model and its tokenizer; see `load_model`."""
        from lococo.models import load_model

        return load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class SlotOptions:
    """What the text is read into.

    Attributes:
        compressor: How entries become slots: auto (what the model was tuned with, or lococo where heads come with it
            for the model, else mass-merge), full, streaming-llm, h2o, tova, snapkv, chunk-mass, look-ahead, mass-merge,
            lococo-paper, lococo, lococo-frozen (which leaves the model's norms alone), a pair such as h2o+mass-merge,
            or a folder of heads.
        num_slots: Entries that survive a compression, per layer and key/value head.
        chunk_size: Tokens per forward pass.
        positions: packed reads texts of any length; original refuses those longer than the model's window.
        budget: How the slots are spread over the layers, at an equal total; own: as learned, or else uniform.
    """

    compressor: str = "auto"
    num_slots: int = 512
    chunk_size: int = 256
    positions: Literal["packed", "original"] = "packed"
    budget: Literal["own", "uniform", "pyramid", "calibrated"] = "own"

    def __post_init__(self) -> None:
        # attach() says the same, but only once the model is loaded.
        check_at_least_one(num_slots=self.num_slots, chunk_size=self.chunk_size)


@dataclass(frozen=True)
class AnswerOptions:
    """How the answer is written.

    Attributes:
        max_new_tokens: Where the answer stops at the latest.
        temperature: 0 takes the likeliest token each time; more is more varied.
        top_p: Sample from the likeliest tokens of this total probability.
        seed: Makes a sampled answer repeatable.
        compiled: Compile the decoding of single tokens first, which takes a minute and a C++ compiler; then they come
            several times as fast.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        # The reader says the same, but only once a long text is read.
        check_at_least_one(max_new_tokens=self.max_new_tokens)
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ArgumentError(f"--seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not (0 <= self.temperature < float("inf") and 0 < self.top_p <= 1):
            raise ArgumentError(
                f"expected temperature >= 0 and 0 < top_p <= 1, got {self.temperature} and {self.top_p}"
            )


def check_at_least_one(**counts: int) -> None:
    """Refuse a count below 1.

    Raises:
        ArgumentError: Names the count.
    """
    for name, value in counts.items():
        if value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number such as 0.001",
    str: "a name",
    tuple: "whole numbers in brackets such as [64, 128]",
}


def check_kinds(options: Any) -> None:
    """Refuse fields of a dataclass that are of another kind than their defaults, as those of a YAML file may be.

    Raises:
        ArgumentError: Names the field.
    """
    for part in fields(options):
        value, kind = getattr(options, part.name), type(part.default)
        of_names = isinstance(part.default, tuple) and isinstance(next(iter(part.default), 0), str)
        if not _is_kind(value, kind, str if of_names else int):
            raise ArgumentError(f"expected {part.name} to be {'names' if of_names else KINDS[kind]}, got {value!r}")


def _is_kind(value: Any, kind: type, of: type = int) -> bool:
    if kind is tuple:
        return isinstance(value, tuple | list) and all(_is_kind(each, of) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_named(**lists: Sequence[object]) -> None:
    """Refuse lists without anything in them, which a recipe may hold.

    Raises:
        ArgumentError: Names the flag.
    """
    for name, value in lists.items():
        if not value:
            raise ArgumentError(f"--{name.replace('_', '-')} is empty; name one or more")


def check_extra(extra: str, *packages: str) -> None:
    """Refuse what needs packages of an extra that are not installed.

    Raises:
        ArgumentError: Names them, and the extra.
    """
    if missing := [name for name in packages if not _installed(name)]:
        raise ArgumentError(f"this needs {', '.join(missing)}; install `lococo[{extra}]`")


def plot_file(plot: str | None) -> Path | None:
    """Return where a plot goes, if one is wanted.

    Raises:
        ArgumentError: If it cannot be written there, or not drawn for want of matplotlib.
    """
    if plot is None:
        return None
    check_extra("eval", "matplotlib")
    picture = output_file(plot)
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if picture.suffix[1:].lower() not in known:
        raise ArgumentError(f"{plot}: expected a picture of {', '.join(sorted(known))}; name a file such as plot.svg")
    return picture


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package around it is there
        return False
