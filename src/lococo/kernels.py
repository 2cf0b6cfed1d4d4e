"""Attention and the mass it gives each entry in one call on a GPU, without a map of attention in memory.

What h2o observes is the column sums of the very map that attention has just computed and thrown away; read off
otherwise, it costs another product of queries and keys, in float32 and with the map written out. Look-ahead scores are
such sums alone. `attention_with_mass` and `column_mass` are computed by Triton, which comes with the CUDA builds of
torch; where it cannot (`usable`), callers go the way they went without. `naive_attention_with_mass` is the plain twin
that tests and the benchmark (`python -m lococo.bench.kernel`) hold them against.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lococo.fast import fast

# What the kernels are made for; wider keys, such as latent attention's, would not fit into a multiprocessor.
WIDEST = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(*tensors: Tensor) -> bool:
    """Tell whether the kernels take these queries, keys and values, (... d), and nobody needs a gradient."""
    return (
        fast()
        and all(each.device.type == "cuda" and each.dtype in DTYPES and each.shape[-1] <= WIDEST for each in tensors)
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
        and _has_kernels(tensors[0].device)
    )


@cache
def _has_kernels(device: torch.device) -> bool:
    """Tell whether Triton is there and the GPU has the products that it makes use of: NVIDIA's, from Ampere on."""
    nvidia = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    return nvidia and find_spec("triton") is not None


@torch.no_grad()
def attention_with_mass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_mass: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over a cache's entries, and sum the probabilities that they get.

    Args:
        query: After RoPE, (b h*g q d).
        key: Entries attended to, after RoPE, (b h s d).
        value: Likewise, (b h s v).
        log_mass: Added to their logits, (b h s).
        visible: How many leading entries each query sees, (b q) or (1 q). One that sees none gets zeros.
        scaling: Factor of the logits.
        softcap: Gemma 2's cap of the logits.
        sinks: Logits beside those of the entries, that belong to none of them, (h g).
        weight: Factor of each query's part in the mass, (b q); 0 leaves a padded query out.

    Returns:
        The output (b q h*g v), in the dtype of `query`, and the mass, column sums over queries and groups, (b h s),
        float32. Sums and softmax are float32; two runs give the same bits.
    """
    from lococo.triton_attention import attend_and_add

    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    output, mass = attend_and_add(
        _rows(query, dtype),
        _rows(key, dtype),
        _rows(value, dtype),
        _rows(log_mass, torch.float32),
        _rows(visible.expand(len(query), -1)),
        scaling=scaling,
        softcap=softcap,
        sinks=None if sinks is None else sinks.float().contiguous(),
        weight=None if weight is None else _rows(weight, torch.float32),
    )
    assert output is not None
    return output.to(query.dtype), mass


@torch.no_grad()
def column_mass(
    key: Tensor,
    log_mass: Tensor,
    queries: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum the probabilities that queries give each entry, (b h s); arguments as of `entries.attention_mass`."""
    from lococo.triton_attention import attend_and_add

    dtype = torch.promote_types(queries.dtype, key.dtype)
    b, q = queries.shape[0], queries.shape[3]
    if visible is None:
        visible = torch.full((1, q), key.shape[2], device=key.device)
    _, mass = attend_and_add(
        _rows(queries.flatten(1, 2), dtype),
        _rows(key, dtype),
        None,
        _rows(log_mass, torch.float32),
        _rows(visible.expand(b, -1)),
        scaling=scaling,
        softcap=softcap,
        sinks=None if sinks is None else sinks.float().contiguous(),
        weight=None if weight is None else _rows(weight, torch.float32),
    )
    return mass


def _rows(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor in a dtype, each of its last dimension's rows in one piece."""
    tensor = tensor if dtype is None else tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.no_grad()
def naive_attention_with_mass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_mass: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `attention_with_mass` the plain way: in double precision, with whole maps, on any device."""
    (b, heads, q, _), (_, h, s, _) = query.shape, key.shape
    queries = query.double().view(b, h, heads // h, q, -1)
    logits = torch.einsum("bhgqd,bhsd->bhgqs", queries, key.double()) * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = logits + log_mass.double()[:, :, None, None]
    hidden = torch.arange(s, device=key.device) >= visible[..., None]
    logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
    beside = logits.new_full((h, heads // h), -torch.inf) if sinks is None else sinks.double()
    with_sinks = torch.cat([logits, beside[:, :, None, None].expand(b, -1, -1, q, 1)], -1)
    map_ = with_sinks.softmax(-1)[..., :-1].nan_to_num(0.0)  # no number: a query that sees nothing
    output = torch.einsum("bhgqs,bhsv->bqhgv", map_, value.double()).flatten(2, 3)
    counted = map_ if weight is None else map_ * weight.double()[:, None, None, :, None]
    return output.to(query.dtype), counted.sum((2, 3)).float()
