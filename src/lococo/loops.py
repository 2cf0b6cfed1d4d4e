"""Loops for a CPU: a few rows times a matrix, attention of one query, and what many queries' attention adds up to.

The libraries' products are made for many rows and reach a quarter of the memory's bandwidth with eight of them; what
torch.compile makes of attention adds up every logit by itself; and maps of attention are written down and read again
four times before their columns are added up. loops.cpp does each in one go (docs/log.md). It is compiled, once for a
machine, by the compiler that torch.compile uses; without one, or without AVX-512, everything is computed as before.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

# From so many rows on the libraries' products are as fast.
MOST_ROWS = 16

# For fewer rows of a map, keys are not worth being put in another order.
FEW_QUERIES = 32

# Bytes of a register, and how many of them a head's numbers may fill.
REGISTER = 64
FILLED = (1, 2, 3, 4, 6, 8)

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_pointer, _number = ctypes.c_void_p, ctypes.c_long
_ARGUMENTS = {
    "few_rows": [_pointer] * 3 + [_number] * 3,
    "attention": [_pointer] * 5 + [_number] * 4 + [ctypes.c_float],
    "column_mass": [_pointer] * 6 + [_number] * 6 + [ctypes.c_float],
}


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `few_rows` knows how: two or more rows (..., d), and a contiguous matrix (n, d) of their type."""
    rows = x.numel() // max(1, x.shape[-1])
    return 1 < rows <= MOST_ROWS and weight.is_contiguous() and _known("few_rows", x, weight)


def attends(key: Tensor, value: Tensor) -> bool:
    """Tell whether `attention` knows how: contiguous keys and values (b h s d)."""
    return (
        key.shape == value.shape
        and key.shape[-1] * key.itemsize in [count * REGISTER for count in FILLED]
        and key.is_contiguous()
        and value.is_contiguous()
        and _known("attention", key, value)
    )


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows by a matrix, see `multiplies`.

    Args:
        x: (..., d).
        weight: (n, d).

    Returns:
        (..., n), in float32.
    """
    product: Tensor = torch.ops.lococo.few_rows(x.reshape(-1, x.shape[-1]), weight)
    return product.view(*x.shape[:-1], -1)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attend with one query per head, see `attends`; the heads of a group lie side by side.

    Args:
        query: (b h*g 1 d), of the type of keys and values.
        key: (b h s d).
        value: Likewise.
        bias: Added to the logits, (b h s) in float32.
        scaling: Factor of the logits before.

    Returns:
        (b h*g 1 d), in float32.
    """
    return cast(Tensor, torch.ops.lococo.attention(query, key, value, bias, scaling))


def sums(queries: Tensor) -> bool:
    """Tell whether `column_mass` knows how, and is faster: queries (b h g q d), not just one or two."""
    *_, g, q, d = queries.shape
    return d % 2 == 0 and g * q >= FEW_QUERIES and _known("column_mass", queries)


def column_mass(
    keys: Tensor,
    log_mass: Tensor,
    queries: Tensor,
    *,
    scaling: float,
    visible: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum the attention probabilities that queries give each entry, see `sums`; all as `entries.attention_mass` has it.

    Keys are taken in the queries' type; logits, probabilities and sums are float32.
    """
    (b, h, s, d), (_, _, g, q, _) = keys.shape, queries.shape
    keys = keys.to(queries.dtype)
    mass = torch.empty(b, h, s)
    seen = None if visible is None else visible.expand(b, q).long().contiguous()
    weights = None if weight is None else weight.expand(b, q).float().contiguous()
    tensors = [keys.contiguous(), log_mass.float().contiguous(), queries.contiguous(), seen, weights, mass]
    pointers = [None if each is None else each.data_ptr() for each in tensors]
    cast("Callable[..., None]", _loop("column_mass", keys.dtype))(*pointers, b * h, h, g * q, q, s, d, scaling)
    return mass


def _known(name: str, *tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    same = all(each.dtype == dtype and each.device.type == "cpu" for each in tensors)
    return same and _loop(name, dtype) is not None


@functools.cache
def _loop(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """Return a loop for a type; None where the processor or the compiler has nothing for it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or dtype not in _NAMES:
        return None
    try:
        loop = getattr(_library(), f"{name}_{_NAMES[dtype]}")
    except (RuntimeError, OSError, AttributeError):  # no compiler, or one that lacks the instructions, or no such loop
        return None
    loop.argtypes, loop.restype = _ARGUMENTS[name], None
    return cast("Callable[..., None]", loop)


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile the loops, or load them where they have been compiled before."""
    from torch._inductor.codecache import CppCodeCache

    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    return cast(ctypes.CDLL, CppCodeCache.load(source, needs_vec_isa=True))


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    (rows, d), n = x.shape, len(weight)
    product = torch.empty(rows, n)
    x = x.contiguous()  # held until the loop has read it
    tensors = [each.data_ptr() for each in (x, weight, product)]
    cast("Callable[..., None]", _loop("few_rows", weight.dtype))(*tensors, rows, n, d)
    return product


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    (b, heads, _, d), (_, h, s, _) = query.shape, key.shape
    mixed = torch.empty(b, heads, 1, d)
    query, bias = query.contiguous(), bias.contiguous()
    tensors = [each.data_ptr() for each in (query, key, value, bias, mixed)]
    cast("Callable[..., None]", _loop("attention", key.dtype))(*tensors, b * h, heads // h, s, d, scaling)
    return mixed


_OPERATORS = torch.library.Library("lococo", "FRAGMENT")
_OPERATORS.define("few_rows(Tensor x, Tensor weight) -> Tensor")
_OPERATORS.define("attention(Tensor query, Tensor key, Tensor value, Tensor bias, float scaling) -> Tensor")
_OPERATORS.impl("few_rows", _few_rows, "CPU")
_OPERATORS.impl("attention", _attention, "CPU")


torch.library.register_fake(
    "lococo::few_rows", lambda x, weight: x.new_empty(len(x), len(weight), dtype=torch.float32), lib=_OPERATORS
)
torch.library.register_fake(
    "lococo::attention", lambda query, *others: query.new_empty(query.shape, dtype=torch.float32), lib=_OPERATORS
)
