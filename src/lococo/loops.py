"""Loops for a CPU: a few rows times a matrix, attention of one query, and what many queries' attention adds up to.

The libraries' products are made for many rows and reach a quarter of the memory's bandwidth with eight of them; what
torch.compile makes of attention adds up every logit by itself; and maps of attention are written down and read again
four times before their columns are added up. loops.cpp does each in one go (docs/log.md). It is compiled once for a
processor, where there is a C++ compiler; without one, or without AVX-512, everything is computed as before.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lococo.cached import cached_folder
from lococo.errors import ModelError

# For more rows the libraries' products are as fast.
MOST_ROWS = 16

# For fewer rows of a map, keys are not worth being put in another order.
FEW_QUERIES = 32

# Bytes of a register, and how many of them a head's numbers may fill.
REGISTER = 64
FILLED = (1, 2, 3, 4, 6, 8)

# What a processor must have, by Linux's names, for loops over numbers of a type.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_NEEDED = {torch.float32: _AVX512, torch.bfloat16: _AVX512 | {"avx512_bf16"}}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]

_pointer, _number = ctypes.c_void_p, ctypes.c_long
_ARGUMENTS: dict[str, list[Any]] = {
    "few_rows": [_pointer] * 3 + [_number] * 3,
    "attention": [_pointer] * 5 + [_number] * 4 + [ctypes.c_float],
    "column_mass": [_pointer] * 6 + [_number] * 6 + [ctypes.c_float],
}

_LOCK = threading.Lock()
_log = logging.getLogger(__name__)


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `few_rows` knows how: two or more rows (..., d), and a contiguous matrix (n, d) of their type."""
    rows = x.numel() // max(1, x.shape[-1])
    fit = weight.dim() == 2 and weight.shape[1] == x.shape[-1] and weight.is_contiguous()
    return fit and 1 < rows <= MOST_ROWS and _known("few_rows", x, weight)


def attends(key: Tensor, value: Tensor) -> bool:
    """Tell whether `attention` knows how: contiguous keys and values (b h s d)."""
    return (
        key.shape == value.shape
        and key.shape[-1] * key.itemsize in [count * REGISTER for count in FILLED]
        and key.is_contiguous()
        and value.is_contiguous()
        and _known("attention", key, value)
    )


def sums(queries: Tensor) -> bool:
    """Tell whether `column_mass` knows how, and is worth it: at least `FEW_QUERIES` queries (b h g q d) per head."""
    *_, g, q, d = queries.shape
    return d % 2 == 0 and g * q >= FEW_QUERIES and _known("column_mass", queries)


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

    Keys are taken in the queries' type; logits, probabilities and sums are float32. A query that sees nothing gives
    nothing.
    """
    return cast(Tensor, torch.ops.lococo.column_mass(keys, log_mass, queries, scaling, visible, weight))


def _known(name: str, *tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    same = all(each.dtype == dtype and each.device.type == "cpu" for each in tensors)
    return same and _loop(name, dtype) is not None


@functools.cache
def _loop(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """Return a loop for a type; None where the processor, or the compiler, has nothing for it."""
    needed = _NEEDED.get(dtype)
    # What torch itself was told to do without is left alone here too.
    if needed is None or torch.backends.cpu.get_cpu_capability() != "AVX512" or not needed.issubset(_processor()):
        return None
    loop = getattr(_library(), f"{name}_{_NAMES[dtype]}", None)
    if loop is not None:
        loop.argtypes, loop.restype = [*_ARGUMENTS[name], ctypes.c_int], None
    return cast("Callable[..., None] | None", loop)


@functools.cache
def _processor() -> tuple[str, ...]:
    """Return what the processor can do, by Linux's names; nothing where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    return tuple(sorted(next((line for line in lines if line.startswith("flags")), "").split()))


def _library() -> ctypes.CDLL | None:
    with _LOCK:  # layers are compressed side by side, and all of them ask at the same time
        return _compiled()


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    """Compile the loops for this processor, or take what was compiled for it before; None where that fails."""
    source = Path(__file__).with_suffix(".cpp")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    try:
        if compiler is None:
            raise OSError("there is no C++ compiler")
        command = [*shlex.split(compiler), *_FLAGS]
        digest = hashlib.sha256(repr((command, _processor())).encode() + source.read_bytes())

        def compile_into(folder: Path, _: Path) -> None:
            line = [*command, str(source), "-o", str(folder / "loops.so")]
            subprocess.run(line, check=True, capture_output=True, text=True)

        folder = cached_folder(f"loops-{digest.hexdigest()[:16]}", "compiling loops for this processor", compile_into)
        return ctypes.CDLL(str(folder / "loops.so"))
    except (OSError, subprocess.SubprocessError, ModelError) as error:
        _log.info("computing without loops of our own: %s", error)
        return None


def _call(name: str, dtype: torch.dtype, tensors: list[Tensor | None], *numbers: float) -> None:
    pointers = [None if each is None else each.data_ptr() for each in tensors]
    cast("Callable[..., None]", _loop(name, dtype))(*pointers, *numbers, torch.get_num_threads())


def _floats(*shape: int) -> Tensor:
    """Return what a loop writes, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    (rows, d), n = x.shape, len(weight)
    product = _floats(rows, n)
    _call("few_rows", weight.dtype, [x.contiguous(), weight.contiguous(), product], rows, n, d)
    return product


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    (b, heads, _, d), (_, h, s, _) = query.shape, key.shape
    mixed = _floats(b, heads, 1, d)
    taken = [query.to(key.dtype), key, value.to(key.dtype), bias.float()]
    _call("attention", key.dtype, [*(each.contiguous() for each in taken), mixed], b * h, heads // h, s, d, scaling)
    return mixed


def _column_mass(
    keys: Tensor, log_mass: Tensor, queries: Tensor, scaling: float, visible: Tensor | None, weight: Tensor | None
) -> Tensor:
    (b, h, s, d), (_, _, g, q, _) = keys.shape, queries.shape
    mass = _floats(b, h, s)
    seen = None if visible is None else visible.expand(b, q).long().contiguous()
    weights = None if weight is None else weight.expand(b, q).float().contiguous()
    taken = [each.contiguous() for each in (keys.to(queries.dtype), log_mass.float(), queries)]
    _call("column_mass", queries.dtype, [*taken, seen, weights, mass], b * h, h, g * q, q, s, d, scaling)
    return mass


_OPERATORS = torch.library.Library("lococo", "FRAGMENT")
_OPERATORS.define("few_rows(Tensor x, Tensor weight) -> Tensor")
_OPERATORS.define("attention(Tensor query, Tensor key, Tensor value, Tensor bias, float scaling) -> Tensor")
_OPERATORS.define(
    "column_mass(Tensor keys, Tensor log_mass, Tensor queries, float scaling, Tensor? seen, Tensor? weight) -> Tensor"
)
_OPERATORS.impl("few_rows", _few_rows, "CPU")
_OPERATORS.impl("attention", _attention, "CPU")
_OPERATORS.impl("column_mass", _column_mass, "CPU")
torch.library.register_fake(
    "lococo::few_rows", lambda x, weight: x.new_empty(len(x), len(weight), dtype=torch.float32), lib=_OPERATORS
)
torch.library.register_fake(
    "lococo::attention", lambda query, *others: query.new_empty(query.shape, dtype=torch.float32), lib=_OPERATORS
)
torch.library.register_fake(
    "lococo::column_mass",
    lambda keys, *others: keys.new_empty(keys.shape[:3], dtype=torch.float32),
    lib=_OPERATORS,
)
