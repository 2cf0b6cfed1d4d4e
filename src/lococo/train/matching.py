"""Attention matching: slots must do to later queries what the entries did that they stand for.

The queries, keys and values are those of the full cache, so the model is read once and every layer learns alone, with
gradients through all compressions of a window and none through the model. After one-shot attention matching
(arXiv 2602.16284), which fits slots to a cache that is all there; here heads learn to make them while the text streams.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lococo.cache import SlotCache
from lococo.slot_layer import SlotLayer
from lococo.train.losses import Teacher

# What a squared error of one nat in the logarithm of all attention mass counts, in shares of the output's energy.
MASS_WEIGHT = 0.1


def attention_errors(
    model: PreTrainedModel, ids: Tensor, cache: SlotCache, teacher: Teacher
) -> Iterator[tuple[Tensor, int]]:
    """Show a window's keys and values to slots, and yield after each chunk how far attention is from the full cache's.

    Args:
        model: Attached.
        ids: (b n).
        cache: Empty.
        teacher: Of the same window.

    Yields:
        The mean over layers of the squared error of attention's output, as a share of its energy, and of the logarithm
        of its mass, summed over the chunk's compared tokens and the batch; and how many those are.
    """
    start, (batch, length) = 0, ids.shape
    while start < length:
        with cache.chunk(batch, length - start, None, None, ids.device) as chunk:
            stop = start + chunk.length
            inside = teacher.compared[(teacher.compared >= start) & (teacher.compared < stop)]
            with torch.set_grad_enabled(len(inside) > 0 and torch.is_grad_enabled()):
                errors = [
                    _error(layer, teacher.layer(layer.layer_idx), start, stop, inside) for layer in cache.slot_layers
                ]
        if len(inside):
            yield torch.stack(errors).mean(), batch * len(inside)
        start = stop


def _error(layer: SlotLayer, full: SlotLayer, start: int, stop: int, inside: Tensor) -> Tensor:
    """Give a chunk to a layer; return the summed error of the queries `inside` it (b h g q)."""
    assert full.queries is not None
    keys, values = layer.update(full.keys[:, :, start:stop], full.values[:, :, start:stop])
    query = full.queries[:, :, :, start:stop].flatten(1, 2)
    bias = layer.attention_bias(query)
    layer.observe(query, full.scaling, full.softcap)
    picked = query[:, :, inside - start]
    if bias is not None:
        bias = bias[:, :, inside - start]
    output, log_mass = attended(picked, keys, values, bias, full)
    with torch.no_grad():
        hidden = torch.arange(stop, device=inside.device) > inside[:, None]
        causal = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
        wanted, full_mass = attended(picked, full.keys[:, :, :stop], full.values[:, :, :stop], causal, full)
        energy = wanted.square().sum(-1).mean().clamp(min=1e-12)
    wrong = (output - wanted).square().sum(-1) / energy + MASS_WEIGHT * (log_mass - full_mass).square()
    return wrong.mean(1).sum()


def attended(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, full: SlotLayer
) -> tuple[Tensor, Tensor]:
    """Return what attention puts out, (b h*g q d), and the logarithm of the mass behind it, (b h*g q), in float32."""
    groups = query.shape[1] // keys.shape[1]
    logits = query.float() @ keys.float().repeat_interleave(groups, 1).transpose(2, 3) * full.scaling
    if full.softcap is not None:
        logits = torch.tanh(logits / full.softcap) * full.softcap
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ values.float().repeat_interleave(groups, 1), logits.logsumexp(-1)
