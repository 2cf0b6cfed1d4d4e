"""A decoder's forward that reads a call of any length chunk by chunk into a SlotCache."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from lococo.around import Around
from lococo.cache import SlotCache
from lococo.cache_name import CACHE_NAMES
from lococo.errors import ArgumentError, LococoError, UnsupportedModelError, WindowError
from lococo.steps import INPUTS, Steps


class ReadingInChunks:
    """The decoder's forward, reading a call with a SlotCache chunk by chunk, whatever its length."""

    def __init__(
        self, forward: Callable[..., Any], decoder: PreTrainedModel, steps: Steps | None, around: Around
    ) -> None:
        self.forward = forward
        self.decoder = decoder
        self.steps = steps
        self.around = around
        self.read = _read_columns
        if steps is None and "torch._dynamo" in sys.modules:
            # A compiled model would trace buffers that are filled from another place in each call.
            self.read = torch.compiler.disable(_read_columns)
        self.__signature__ = inspect.signature(forward)  # generate() looks at it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Read as the decoder does; without a SlotCache it is the decoder that does.

        Raises:
            ArgumentError: If the call asks for what slots cannot do, or there is nothing to read.
            WindowError: If the text leaves the window, and positions are the text's own.
        """
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        cache = next((value for name in CACHE_NAMES if isinstance(value := arguments.get(name), SlotCache)), None)
        if cache is None:
            return self.forward(*args, **kwargs)
        if arguments.get("use_cache") is False:
            raise ArgumentError("a SlotCache came with use_cache=False; leave use_cache out, or the cache")
        if self.decoder.training and getattr(self.decoder, "gradient_checkpointing", False):
            raise ArgumentError(
                "transformers drops the cache under gradient checkpointing, so nothing can be read in slots; "
                "call model.gradient_checkpointing_disable()"
            )
        return self.read(self.forward, self.steps, cache, arguments | self.around.plain(arguments))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise LococoError(
            "an attached model cannot be copied: the copy would read with this one's weights; leave first"
        )


def _read_columns(forward: Callable[..., Any], steps: Steps | None, cache: SlotCache, arguments: dict[str, Any]) -> Any:
    inputs: Tensor = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    batch, columns = inputs.shape[:2]
    if not columns:
        raise ArgumentError("expected at least one token to read, got none; give a prompt that is not empty")
    seen = cache.rows.seen
    real = _real_columns(arguments.get("attention_mask"), batch, columns, seen)
    position_ids = arguments.get("position_ids")
    _check_window(cache, columns, position_ids)
    if steps is not None and real is None and steps.takes(cache, arguments):
        with cache.chunk(batch, columns, real, position_ids, inputs.device) as chunk:
            return steps(cache, chunk.position_ids, **{name: arguments.get(name) for name in INPUTS})
    outputs = []
    start = 0
    while start < columns:
        rest = None if real is None else real[:, start:]
        places = None if position_ids is None else position_ids[:, start:]
        with cache.chunk(batch, columns - start, rest, places, inputs.device) as chunk:
            stop = start + chunk.length
            piece = {name: _cut(name, value, start, stop, seen) for name, value in arguments.items()}
            piece.update(position_ids=chunk.position_ids, slot_cache=cache)
            with cache.norms_holding():
                outputs.append(forward(**piece))
        start = stop
    return outputs[0] if len(outputs) == 1 else _join(outputs)


# Arguments with one entry per column of the call.
PER_COLUMN = (*INPUTS, "token_type_ids", "per_layer_inputs")


def _cut(name: str, value: Any, start: int, stop: int, seen: int) -> Any:
    """Return what a chunk gets of an argument of the whole call."""
    if name == "attention_mask" and value is not None:
        return value[:, : seen + stop]
    return value[:, start:stop] if name in PER_COLUMN and value is not None else value


def _real_columns(attention_mask: Any, batch: int, columns: int, seen: int) -> Tensor | None:
    """Return which columns of a call are tokens, (b columns) bool; None where all are."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, seen + columns):
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ArgumentError(
            f"a SlotCache that has seen {seen} columns takes an attention mask of shape "
            f"({batch}, {seen + columns}), got {shape}"
        )
    real = attention_mask[:, -columns:].bool()
    return None if bool(real.all()) else real


def _check_window(cache: SlotCache, columns: int, position_ids: Tensor | None) -> None:
    if position_ids is not None and position_ids.ndim != 2:
        raise UnsupportedModelError("positions of more than one dimension (of images) cannot be read in slots yet")
    # A decoding step is let through: stopping an answer in its middle helps nobody.
    if cache.positions == "packed" or cache.window is None or columns == 1:
        return
    end = max(cache.rows.next_position, default=0) + columns if position_ids is None else int(position_ids.max()) + 1
    if end > cache.window:
        raise WindowError(
            f"the text reaches position {end}, but the model was trained for {cache.window} and positions are "
            "'original'; use positions='packed' to read further"
        )


def _join(outputs: list[Any]) -> Any:
    """Put the outputs of a call's chunks together."""
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs], 1), *outputs[-1][1:])
    joined: ModelOutput = outputs[-1]
    if getattr(joined, "attentions", None) is not None:
        raise ArgumentError("attention maps over slots have a width of their own in every chunk; read chunk by chunk")
    batch = outputs[-1].last_hidden_state.shape[0]
    joined["last_hidden_state"] = torch.cat([output.last_hidden_state for output in outputs], 1)
    if getattr(joined, "hidden_states", None) is not None:
        layers = zip(*(output.hidden_states for output in outputs), strict=True)
        joined["hidden_states"] = tuple(torch.cat(layer, -2) for layer in layers)  # Gemma 3n has (4 b q d) within
    if getattr(joined, "router_logits", None) is not None:
        routers = zip(*(output.router_logits for output in outputs), strict=True)
        joined["router_logits"] = tuple(_join_rows(router, batch) for router in routers)
    return joined


def _join_rows(parts: Sequence[Tensor], batch: int) -> Tensor:
    """Put together what models of experts return of a chunk with rows and columns in one dimension, (b*q e)."""
    return torch.cat([part.unflatten(0, (batch, -1)) for part in parts], 1).flatten(0, 1)
