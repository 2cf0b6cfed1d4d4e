"""What a decoder does with one token at two positions.

How keys turn, which layers turn theirs at all and whether attention can be replaced is not written in any config that
all models share. One forward pass of one token tells: alone in its text it attends to itself wherever it stands, so
the hidden states are the same at both positions, and all that differs is what each layer did to its key.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from lococo.cache_name import cache_name
from lococo.errors import UnsupportedModelError

# Positions between the two; few enough for any window, and enough to turn every key that turns.
STEP = 7

# Share of a recurrent state by which it differs where the earlier half of the text is lost, and not by rounding.
GONE = 0.1

NAME = "probe"


@dataclass(frozen=True)
class Probe:
    """What was seen.

    Attributes:
        attention: The attention module of each layer that was reached through transformers' registry.
        cached: What each layer put into the cache, keys and values (2 h 1 d): at position 0 and at STEP.
        goes_on: Whether recurrent states, if any, go on from one call to the next when it holds several tokens.
    """

    attention: dict[int, nn.Module]
    cached: dict[int, tuple[Tensor, Tensor]]
    goes_on: bool


def probed(decoder: PreTrainedModel) -> Probe | None:
    """Read one token at two positions.

    Args:
        decoder: The base model; it is left as it was found.

    Returns:
        What was seen; None for a model without weights (meta device).

    Raises:
        UnsupportedModelError: If the model does not take transformers' own cache.
    """
    if any(parameter.is_meta for parameter in decoder.parameters()):
        return None
    attention: dict[int, nn.Module] = {}
    cache = DynamicCache(config=decoder.config)
    arguments: dict[str, Any] = {"position_ids": torch.tensor([[0], [STEP]], device=decoder.device)}
    if any(each.kind is each.VAR_KEYWORD for each in inspect.signature(decoder.forward).parameters.values()):
        arguments["reached"] = attention
    token = decoder.config.get_text_config(decoder=True).vocab_size // 2  # the first ones may be padding, all zeros
    ids = torch.full((2, 1), token, device=decoder.device)
    try:
        with torch.no_grad(), _noting(decoder):
            decoder(input_ids=ids, **{cache_name(decoder): cache}, use_cache=True, **arguments)
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} does not read with transformers' DynamicCache, whose place slots take: {error}"
        ) from error
    pairs = ((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers)
    cached = {i: (keys, values) for i, (keys, values) in enumerate(pairs) if keys is not None and values is not None}
    return Probe(attention, cached, _goes_on(decoder, token))


@torch.no_grad()
def _goes_on(decoder: PreTrainedModel, token: int) -> bool:
    """Tell whether two calls of two tokens leave the recurrent states that one call of four does."""
    whole, parts = DynamicCache(config=decoder.config), DynamicCache(config=decoder.config)
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in whole.layers):
        return True
    ids = torch.full((1, 4), token, device=decoder.device)
    with _noting(decoder):
        for cache, length in ((whole, 4), (parts, 2)):
            for piece in ids.split(length, 1):
                decoder(input_ids=piece, **{cache_name(decoder): cache}, use_cache=True)
    pairs = zip(whole.layers, parts.layers, strict=True)
    states = [(getattr(a, "recurrent_states", {}), getattr(b, "recurrent_states", {})) for a, b in pairs]
    both = [(a[number].float(), b[number].float()) for a, b in states for number in a if a[number] is not None]
    return all(bool((a - b).norm() <= GONE * a.norm()) for a, b in both)


@contextmanager
def _noting(decoder: PreTrainedModel) -> Iterator[None]:
    """Let attention note who asked for it, without dropout, until the block ends."""
    config, training = decoder.config, [module for module in decoder.modules() if module.training]
    implementation = config._attn_implementation
    AttentionInterface.register(NAME, partial(_noted, implementation))
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    config._attn_implementation = NAME
    decoder.eval()
    try:
        yield
    finally:
        config._attn_implementation = implementation
        for module in training:
            module.training = True


def _noted(
    implementation: str, module: nn.Module, *args: Any, reached: dict[int, nn.Module] | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if reached is not None:
        reached[cast(int, module.layer_idx)] = module
    return attention_function(implementation, module)(module, *args, **kwargs)


def attention_function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return an attention function; "eager" is the one of the module's own modelling file."""
    own = modeling_function(module, "eager_attention_forward")
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, cast(Callable[..., Any], own))
    return cast(Callable[..., tuple[Tensor, Tensor | None]], function)


def modeling_function(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """Return a function of the modelling file that defines the module's class, or None where it has none."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):  # nn.Module, or what sharding has put before the module's own class
            continue
        function = getattr(sys.modules[cls.__module__], name, None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    return None
