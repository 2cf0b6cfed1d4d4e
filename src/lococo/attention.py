"""Attention over slots and chunk, through whatever attention function the model had.

A model that is attached runs under the name "lococo-<its own>" in transformers' registry of attention functions. Layers
that hold slots get their own additive mask (causality in the chunk, padding, log_mass) and show their queries to the
cache afterwards; every other layer, and every call without a SlotCache, runs as before.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from lococo import kernels, loops
from lococo.cache import SlotCache
from lococo.fast import fast
from lococo.probe import attention_function
from lococo.slot_layer import SlotLayer
from lococo.steps import StepCache, StepLayer

PREFIX = "lococo-"

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def register(implementation: str) -> str:
    """Register attention over slots on top of an attention implementation of transformers.

    Args:
        implementation: "eager", "sdpa", or another name that transformers knows.

    Returns:
        The name to put into the model's config.
    """
    name = PREFIX + implementation
    AttentionInterface.register(name, partial(slot_attention, implementation))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def slot_attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slot_cache: SlotCache | StepCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend over slots and chunk.

    Args:
        implementation: The model's own attention implementation.
        module: The attention module, with its `layer_idx`.
        query: After RoPE, (b h*g q d).
        key: What the cache's `update` returned, (b h s d).
        value: Likewise.
        attention_mask: transformers' mask; slot layers make their own.
        slot_cache: The cache of this call, if it holds slots.
        **kwargs: What the model passes on: scaling, dropout, softcap.

    Returns:
        The output (b q h*g d), and the attention map where the implementation returns one.
    """
    layer = None if slot_cache is None else slot_cache.attended(cast(int, module.layer_idx), key)
    if layer is None:
        return attention_function(implementation, module)(module, query, key, value, attention_mask, **kwargs)
    if query.requires_grad and isinstance(layer, SlotLayer):  # compiled steps have no gradient
        layer.lent.update(("keys", "values"))
    sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    # Flash and flex kernels take no bias per entry, and sdpa knows neither sinks nor a cap of the logits.
    own = implementation
    if own not in ("eager", "sdpa"):
        own = "sdpa" if sinks is None and softcap is None else "eager"
    function = attention_function(own, module)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    mass = None
    output: tuple[Tensor, Tensor | None]
    if _gives_mass(implementation, layer, module, query, key, value, **kwargs):
        mixed, mass = cast(SlotLayer, layer).attend_with_mass(query, key, value, scaling, softcap, sinks)
        output = mixed, None
    elif own == "sdpa" and isinstance(layer, StepLayer) and layer.looped and _plain(query, key, **kwargs):
        mixed = loops.attention(query, key, value, layer.entry_bias(), scaling)
        output = mixed.to(query.dtype).transpose(1, 2), None
    elif own == "sdpa" and query.shape[0] == 1 and query.shape[2] > 1 and query.device.type == "cpu" and fast():
        bias = layer.shared_bias(query)
        if _as_products(query, key, value, bias, **kwargs):
            output = _by_products(query, key, value, bias, scaling), None
        else:
            output = _without_copies(function, query, key, value, bias, **kwargs)
    else:
        output = function(module, query, key, value, layer.attention_bias(query), **kwargs)
    if layer.layer_idx == module.layer_idx:  # and not one that looks into another's cache
        layer.observe(layer.seen_by(module, query.detach()), scaling, softcap, sinks, mass)
    return output


def _gives_mass(
    implementation: str,
    layer: SlotLayer | StepLayer,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> bool:
    """Tell whether one kernel gives a chunk's output together with the mass that the layer's compressor asks for.

    Not where the model wants its maps ("eager"), nor where its own sdpa leaves out a cap or sinks.
    """
    differs = implementation == "eager" or (implementation == "sdpa" and (softcap is not None or s_aux is not None))
    return (
        type(layer) is SlotLayer
        and layer.mass is not None
        and layer.layer_idx == module.layer_idx
        and not differs
        and not dropout
        and kwargs.get("position_bias") is None
        and kernels.usable(query, key, value)
    )


def _plain(
    query: Tensor, key: Tensor, dropout: float = 0.0, position_bias: Tensor | None = None, **kwargs: Any
) -> bool:
    """Tell whether sdpa is asked for nothing that attention of our own does not know."""
    return query.dtype == key.dtype and not dropout and position_bias is None


def _as_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, **kwargs: Any) -> bool:
    """Tell whether `_by_products`, which writes in place, computes what sdpa does, and faster."""
    # Heads that learn give keys, values and masses a gradient where the model's own queries have none.
    learning = any(each is not None and each.requires_grad for each in (query, key, value, bias))
    return query.dtype == torch.bfloat16 and not learning and _plain(query, key, **kwargs)


def _by_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attend with the query heads of one row that share keys and values as rows of one matrix.

    What sdpa does on a CPU takes half as long again in bfloat16, which it turns into float32 (docs/log.md). Logits are
    rounded here, as "eager" rounds them; sums are float32 inside both products and softmax.

    Args:
        query: After RoPE, (1 h*g q d).
        key: (1 h s d).
        value: Likewise.
        bias: Added to the logits, (1 h|1 q s), or None.
        scaling: Factor of the logits.

    Returns:
        The output (1 q h*g d).
    """
    (_, heads, q, d), h = query.shape, key.shape[1]
    logits = (query * scaling).reshape(h, -1, d) @ key[0].transpose(1, 2)
    if bias is not None:
        logits.view(h, -1, q, logits.shape[-1]).add_(bias[0][:, None])
    mixed = torch.softmax(logits, -1, out=logits) @ value[0]
    return mixed.view(1, heads, q, -1).transpose(1, 2).contiguous()


def _without_copies(
    function: AttentionFunction, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend with the query heads of one row as a batch, which shares keys, values and bias instead of repeating them.

    On a CPU a fifth of attention's time goes into those copies (docs/log.md). Arguments and results are those of
    `function`, but that `bias` is given per key/value head.
    """
    (_, heads, q, d), h = query.shape, key.shape[1]
    groups = heads // h
    shared = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    apart = query.view(h, groups, q, d).transpose(0, 1)
    key, value = (tensor.expand(groups, -1, -1, -1) for tensor in (key, value))
    bias = None if bias is None else bias.expand(groups, -1, -1, -1)
    output, weights = function(shared, apart, key, value, bias, **kwargs)
    return output.permute(1, 2, 0, 3).reshape(1, q, heads, -1), weights
