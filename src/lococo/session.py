"""What the verbs share: a model that is attached, documents read into a cache, questions answered."""

import contextlib
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lococo import compressors
from lococo.attachment import Attachment, attach, slot_layer_indices, window_of
from lococo.budgets import slots_for
from lococo.cache import SlotCache, kv_nbytes
from lococo.default_model import DEFAULT_MODEL
from lococo.errors import ArgumentError, FileFormatError, ModelError, WindowError
from lococo.files import Text
from lococo.models import model_id
from lococo.options import AnswerOptions, ModelOptions, SlotOptions
from lococo.progress import reading
from lococo.prompts import Prompt, text_stream
from lococo.reader import prefill, stream
from lococo.storage import ContextInfo, describe_context, load_context
from lococo.tokenization import encode_stream

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Session:
    """A model attached for the time of a verb."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    slots: Attachment
    prompt: Prompt

    def read(self, cache: Cache, text: Text) -> "Reading":
        """Read the opening of a prompt and a text into an empty cache.

        Raises:
            WindowError: If the text is longer than the model's window and nothing is packed.
        """
        token_ids = array("i")

        def kept(lists: Iterable[list[int]]) -> Iterator[list[int]]:
            for ids in lists:
                token_ids.extend(ids)
                self._check_window(cache, len(token_ids))
                yield ids

        opening = self.prompt.opening_ids()
        start = time.perf_counter()
        with reading(cache, text.nbytes) as progress:
            continues = self.prompt.continues(opening)
            encoded = encode_stream(self.tokenizer, progress.feed(text.pieces), continues=continues)
            ids = kept(progress.encode(chain([opening] if opening else [], encoded)))
            prefill(self.model, ids, cache, progress=progress.advance)
        return Reading(token_ids, time.perf_counter() - start, progress.peak_resident)

    def _check_window(self, cache: Cache, tokens: int) -> None:
        """Refuse as soon as the tokens are counted, and for the full cache at all, which would only read badly."""
        window = window_of(self.model)
        if window is None or tokens <= window or (isinstance(cache, SlotCache) and cache.positions == "packed"):
            return
        how = "positions are 'original'" if isinstance(cache, SlotCache) else "compressor 'full' keeps every position"
        remedy = "--positions packed" if isinstance(cache, SlotCache) else "--compressor mass-merge"
        raise WindowError(
            f"the text has at least {tokens:,} tokens, but the model was trained for {window:,} and {how}; use {remedy}"
        )

    def answer(self, cache: Cache, question: str, how: AnswerOptions, *, after: str = "document") -> Iterator[str]:
        """Ask a question and yield the answer as it comes; see `Prompt.question_ids` for `after`."""
        tokens = stream(
            self.model,
            self.prompt.question_ids(question, after=after),
            cache,
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
        )
        return text_stream(self.tokenizer, tokens)

    def figures(self, cache: Cache, tokens: int) -> dict[str, Any]:
        """Return what a cache that has read this many tokens holds, as JSON takes it."""
        facts, slots = self.slots.facts, self.slots
        entry = 2 * facts.num_key_value_heads * facts.head_dim * self.model.dtype.itemsize
        return {
            "model": model_id(self.model),
            "compressor": slots.compressor.name if slots.compressor is not None else "full",
            "num_slots": None if slots.compressor is None else slots.num_slots,
            "chunk_size": slots.chunk_size,
            "positions": slots.positions,
            "tokens": tokens,
            "kv_nbytes": kv_nbytes(cache),
            "full_kv_nbytes": entry * len(slots.layers) * tokens,
        }


@dataclass(frozen=True)
class Reading:
    """What a read came to.

    Attributes:
        token_ids: All tokens that were read.
        seconds: It took.
        peak_resident: The most memory that the process held after any chunk, bytes.
    """

    token_ids: "array[int]"
    seconds: float
    peak_resident: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second."""
        return len(self.token_ids) / self.seconds


@contextlib.contextmanager
def opened(
    using: ModelOptions, slots: SlotOptions, *, loaded: Loaded | None = None, compiled: bool = False
) -> Iterator[Session]:
    """Load a model, unless it is loaded, and attach it; what can be checked without the model is checked first."""
    _check_compressor(slots)
    model, tokenizer = loaded or using.load()
    budget = None
    if slots.budget != "own" and slots.compressor != "full":
        budget = slots_for(
            model,
            tokenizer,
            slots.budget,
            compressor=slots.compressor,
            num_slots=slots.num_slots,
            chunk_size=slots.chunk_size,
        )
    attachment = attach(
        model,
        slots.compressor,
        num_slots=slots.num_slots,
        chunk_size=slots.chunk_size,
        positions=slots.positions,
        slots_per_layer=budget,
        compiled=compiled,
    )
    with attachment:
        yield Session(model, tokenizer, attachment, Prompt.of(tokenizer))


@contextlib.contextmanager
def resumed(
    path: Path, using: ModelOptions, *, heads_folder: str | None = None, compiled: bool = False
) -> Iterator[tuple[Session, SlotCache, "torch.Tensor", ContextInfo]]:
    """Load a context with the model and settings it was made with; yield the session, cache, token ids and header.

    Args:
        path: The context.
        using: The model, where it is not under the name it had.
        heads_folder: Of the heads, where it is not the one it was.
        compiled: Compile decoding.
    """
    info = describe_context(path)
    compressor = info.compressor if heads_folder is None else str(Path(heads_folder).expanduser())
    if compressors.lies_in_a_folder(compressor) and not Path(compressor).is_dir():
        raise FileFormatError(
            f"{path} was made with the heads in {compressor}, where there are none; "
            "say with --heads-folder where they are"
        )
    model, tokenizer = _load_named(info, using)
    theirs, ours = len(info.slots_per_layer), len(slot_layer_indices(model))
    if theirs != ours:  # load_context compares the rest
        raise FileFormatError(
            f"{path} was made with {info.model}, which has {theirs} layers with slots, "
            f"but {model_id(model)} has {ours}; name the model it was made with"
        )
    attachment = attach(
        model,
        compressor,
        num_slots=max(1, sum(info.slots_per_layer) // len(info.slots_per_layer)),
        chunk_size=info.chunk_size,
        positions=info.positions,  # type: ignore[arg-type]
        slots_per_layer=info.slots_per_layer,
        compiled=compiled,
    )
    with attachment:
        context = load_context(path, attachment, tokenizer)
        yield Session(model, tokenizer, attachment, Prompt.of(tokenizer)), context.cache, context.token_ids, info


def _load_named(info: ContextInfo, using: ModelOptions) -> Loaded:
    """Load the model that a context names, unless the user says where it is."""
    if using.model is not None or info.model == DEFAULT_MODEL:
        return using.load()
    try:
        return replace(using, model=info.model).load()
    except ModelError as error:
        raise ModelError(
            f"{info.path} was made with the model {info.model}, which is not found under that name; "
            "say where it is with --model"
        ) from error


def _check_compressor(slots: SlotOptions) -> None:
    """Refuse an unknown name, or too few slots for a known one, before a model is loaded."""
    known_later = slots.compressor in ("full", "auto", "lococo", compressors.FROZEN)
    if known_later or (slots.compressor not in compressors.PAIRS and Path(slots.compressor).is_dir()):
        return
    least = compressors.make(slots.compressor, compressors.Shape({0: slots.num_slots}, 64)).min_slots()
    if slots.num_slots < least:
        raise ArgumentError(
            f"{slots.compressor} needs at least {least} slots, of which it keeps {least - 1} for the first and last "
            f"tokens; got {slots.num_slots}, raise --num-slots"
        )
