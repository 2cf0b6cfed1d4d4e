"""Attach a compressor to a model for the time of a `with` block."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from lococo import attention, compressors, loops
from lococo.around import Around
from lococo.cache import Positions, SlotCache, grows
from lococo.chunked import ReadingInChunks
from lococo.compressors import Compressor, Shape
from lococo.errors import ArgumentError, LococoError, UnsupportedModelError
from lococo.facts import ModelFacts, weights_fingerprint
from lococo.fast import fast
from lococo.graphs import linear_step
from lococo.norms import norms_of
from lococo.probe import Probe, probed
from lococo.rope import Rotary
from lococo.steps import Steps
from lococo.tuned import TUNED_FOR


class Attachment:
    """A model that can read in slots; made by `attach`, active inside `with`."""

    def __init__(
        self,
        model: PreTrainedModel,
        compressor: str | Compressor,
        num_slots: int,
        slots_per_layer: Sequence[int] | None,
        chunk_size: int,
        positions: Positions,
        compiled: bool,
    ) -> None:
        self.model = model
        # Of a model that sees images, the language model within it.
        self.decoder = cast(PreTrainedModel, model.get_decoder())
        self.chunk_size = chunk_size
        self.positions = positions
        self.compiled = compiled
        self.facts = ModelFacts.of(model)
        self.layers = slot_layer_indices(model)
        probe = probed(self.decoder)
        if probe is not None:
            _check_attention(type(model).__name__, probe, self.layers, chunk_size)
        self.rotary = Rotary(self.decoder, probe)
        uniform = [num_slots] * len(self.layers)
        self.compressor = self._make(compressor, uniform if slots_per_layer is None else list(slots_per_layer))
        if slots_per_layer is None:
            own, window = getattr(self.compressor, "slots_per_layer", None), window_of(model)
            most = None if window is None else window - chunk_size
            slots_per_layer = uniform if own is None else own(num_slots, most)
        self.slots_per_layer = list(slots_per_layer)
        mean = sum(self.slots_per_layer) / len(self.slots_per_layer)
        self.num_slots = int(mean) if mean == int(mean) else mean
        self.norms = norms_of(self.compressor)
        self._undo: list[Callable[[], None]] = []

    def _make(self, compressor: str | Compressor, slots_per_layer: list[int]) -> Compressor | None:
        """Return the compressor, on the model's device; None stands for "full"."""
        if compressor == "full":
            return None
        if isinstance(compressor, str):
            by_layer = dict(zip(self.layers, slots_per_layer, strict=True))
            compressor = compressors.make(compressor, Shape(by_layer, self.facts.head_dim, self.facts))
        learned = compressors.modules(compressor)
        if learned and self.rotary.latent:
            raise UnsupportedModelError(
                f"{compressor.name} is learned from keys and values, but {type(self.model).__name__} caches latents "
                "that both are made of; use a compressor without learned heads, such as 'mass-merge'"
            )
        for module in learned:
            module.to(self.model.device)
        least = compressor.min_slots()
        if min(slots_per_layer) < least:
            raise ArgumentError(
                f"{compressor.name} keeps {least - 1} first and last entries and needs at least {least} slots in every "
                f"layer, but {min(slots_per_layer)} were given; raise num_slots"
            )
        return compressor

    def fingerprint(self) -> str:
        """Return a short hash of what decides how a text is read: model, compressor, slots, chunks, positions."""
        config = self.model.config.to_diff_dict() | {"_name_or_path": "", "transformers_version": ""}
        name = "full" if self.compressor is None else self.compressor.name
        if compressors.lies_in_a_folder(name):  # which may move
            name = "heads"
        how = (self.model.dtype, name, compressors.METHODS, self.slots_per_layer, self.chunk_size, self.positions)
        digest = hashlib.sha256(weights_fingerprint(self.model).encode())
        digest.update(json.dumps([config, *map(str, how)], sort_keys=True, default=str).encode())
        if self.compressor is not None:
            if name == "heads":
                digest.update(compressors.selection_of(self.compressor).encode())
            compressors.hash_trained(digest, self.compressor)
        return digest.hexdigest()[:16]

    def new_cache(self) -> Cache:
        """Return an empty cache for `past_key_values`: a SlotCache, or transformers' DynamicCache for "full"."""
        empty = DynamicCache(config=self.model.config)
        if self.compressor is None:
            return empty
        return SlotCache(
            empty.layers,
            self.compressor,
            self.slots_per_layer,
            self.chunk_size,
            self.positions,
            self.rotary,
            window_of(self.model),
        )

    def __enter__(self) -> "Attachment":
        """Let the model read in slots.

        Raises:
            LococoError: If the model is attached already.
        """
        config = self.decoder.config
        implementation = config._attn_implementation
        if implementation.startswith(attention.PREFIX):
            raise LococoError("the model is attached already; leave the first `with attach(...)` before the second")
        undo: list[Callable[[], None]] = [lambda: setattr(config, "_attn_implementation", implementation)]
        config._attn_implementation = attention.register(implementation)
        forward = self.decoder.forward
        steps = Steps(forward, self.decoder) if self.compiled else None
        around = Around(self.model, self.decoder)
        undo.append(around.watch())
        undo.append(_replace_forward(self.decoder, ReadingInChunks(forward, self.decoder, steps, around)))
        head = self.model.get_output_embeddings()
        if self.compiled and type(head) is nn.Linear:
            undo.append(_replace_forward(head, partial(_logits, head.forward, head)))
        undo += [] if self.norms is None else [handle.remove for handle in self.norms.install(self.decoder)]
        self._undo = undo
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the model as it was found."""
        while self._undo:
            self._undo.pop()()


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give a module another forward; what is returned gives it its own back."""
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    module.forward = forward
    return restore


def _logits(forward: Callable[[Tensor], Tensor], head: nn.Linear, hidden: Tensor) -> Tensor:
    """Read logits off hidden states, compiled for one row of them, and in a loop of our own for a few."""
    if torch.is_grad_enabled() or not fast():
        return forward(hidden)
    if hidden.numel() == hidden.shape[-1]:
        return linear_step(hidden.reshape(-1), head.weight, head.bias).view(*hidden.shape[:-1], -1)
    if loops.multiplies(hidden, head.weight):
        logits = loops.few_rows(hidden, head.weight).to(hidden.dtype)
        return logits if head.bias is None else logits + head.bias
    return forward(hidden)


def attach(
    model: PreTrainedModel,
    compressor: str | Compressor = "auto",
    *,
    num_slots: int = 512,
    chunk_size: int = 256,
    positions: Positions = "packed",
    slots_per_layer: Sequence[int] | None = None,
    compiled: bool = False,
) -> Attachment:
    """Let a model read text of any length in a fixed number of key/value slots.

    Args:
        model: A decoder of transformers with attention.
        compressor: A name of `lococo.COMPRESSORS`, a pair "selection+merge", a folder of heads, or a Compressor. "auto"
            takes what the model was tuned with, or the heads that come with lococo for it, or else "mass-merge".
        num_slots: Entries that survive a compression, per layer and key/value head.
        chunk_size: Tokens per forward pass; the cache holds num_slots + chunk_size entries.
        positions: "packed" reads texts of any length; "original" refuses those longer than the model's window and is
            the same for all others, see `SlotCache`.
        slots_per_layer: Another number of slots for every layer, of mean num_slots; see `lococo.budgets`. By default
            what learned heads bring along, and num_slots for all others.
        compiled: Compile the decoding of single tokens with torch.compile: the first of them waits for a C++ compiler,
            a minute for 30 layers, and all others come several times as fast.

    Returns:
        A context manager; inside, `new_cache()` makes caches for `model.generate(past_key_values=...)` and for the
        functions of `lococo.reader`. Afterwards the model is as it was.

    Raises:
        ArgumentError: If a number is out of range or a name unknown.
        UnsupportedModelError: If the model has no key/value cache that slots could replace.

    Example:
        >>> with lococo.attach(model, "mass-merge", num_slots=256) as slots:
        ...     model.generate(**inputs, past_key_values=slots.new_cache())
    """
    for name, value in (("num_slots", num_slots), ("chunk_size", chunk_size)):
        if not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a whole number of at least 1, got {value!r}")
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()} - {"cpu", "disk"}
    if len(places) > 1 and compressor != "full":
        raise UnsupportedModelError(
            f"the model lies on {len(places)} devices ({', '.join(sorted(places))}), and slots are kept on one; "
            "load it onto one of them, in fewer bits or with the layers that do not fit offloaded to the CPU"
        )
    if positions not in ("original", "packed"):
        raise ArgumentError(f"positions must be 'original' or 'packed', got {positions!r}")
    layers = slot_layer_indices(model)
    if slots_per_layer is not None and (
        len(slots_per_layer) != len(layers) or not all(isinstance(m, int) and m > 0 for m in slots_per_layer)
    ):
        raise ArgumentError(
            f"slots_per_layer must hold a positive whole number for each of the {len(layers)} layers, "
            f"got {list(slots_per_layer)}"
        )
    if compressor == "auto":
        compressor = getattr(model, TUNED_FOR, None) or compressors.default(ModelFacts.of(model))
    attachment = Attachment(model, compressor, num_slots, slots_per_layer, chunk_size, positions, compiled)
    window = window_of(model)
    # What was asked for: heads share slots out so that no layer has more than fit, if that can be.
    most = num_slots if slots_per_layer is None else max(slots_per_layer)
    if attachment.compressor is not None and window is not None and most + chunk_size > window:
        raise ArgumentError(
            f"{most} slots and a chunk of {chunk_size} do not fit the model's window of {window}; "
            "lower num_slots or chunk_size"
        )
    return attachment


def window_of(model: PreTrainedModel) -> int | None:
    """Return how many positions the model can be read at without a change of its RoPE, or None where it says nothing.

    Models with longrope rotate by other angles beyond their original window, which keys in a cache cannot follow.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings")
        window = original or getattr(config, "original_max_position_embeddings", None) or window
    return window if window and window < math.inf else None


def slot_layer_indices(model: PreTrainedModel) -> list[int]:
    """Return the layers whose cache grows with the text, which are those that slots replace.

    Raises:
        UnsupportedModelError: If there are none.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder model; lococo compresses the cache of decoder models"
        )
    if getattr(model, "_is_stateful", False) and not getattr(model.config, "num_attention_heads", None):
        raise UnsupportedModelError(
            f"{kind} keeps a recurrent state, not a key/value cache; there is nothing to compress"
        )
    window = window_of(model)
    layers = [i for i, layer in enumerate(DynamicCache(config=model.config).layers) if grows(layer, window)]
    if not layers:
        raise UnsupportedModelError(
            f"no layer of {kind} has a cache that grows with the text (all are sliding or recurrent); "
            "its memory is constant already"
        )
    return layers


def _check_attention(kind: str, probe: Probe, layers: list[int], chunk_size: int) -> None:
    """Make sure that attention over slots can take the place of the model's own in these layers, chunk by chunk.

    Raises:
        UnsupportedModelError: If the model computes attention otherwise than by transformers' attention functions, as
            those with ALiBi do, or does not hand them what its forward was given; or if its recurrent layers forget.
    """
    if not probe.goes_on and chunk_size > 1:
        raise UnsupportedModelError(
            f"the recurrent layers of {kind} forget what they have read with every call of more than one token, got "
            f"a chunk_size of {chunk_size}; use chunk_size=1"
        )
    missed = [layer_idx for layer_idx in layers if layer_idx not in probe.attention]
    if missed:
        raise UnsupportedModelError(
            f"{kind} computes attention by itself in layers {missed}, or passes no arguments on to transformers' "
            "attention functions, so nothing there can weigh a slot; read it with compressor 'full'"
        )
