"""The Triton kernels of `lococo.kernels`, and their launches. Imported only where they run.

Two passes over the keys. The first is attention as flash attention does it, and keeps the logarithm of every query's
sum; with it the second knows each probability at once and adds up columns, a block of keys per program, in a fixed
order. So no map is written, nothing is added by atomics, and two runs give the same bits.

Query heads that share a key/value head are folded: row r of the (g q) rows of one is query r % q of head r // q.
Logits are in powers of 2, which is what GPUs compute.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)

# About as many programs as a large GPU has multiprocessors: with fewer, blocks are made smaller.
PROGRAMS = 132

# Counts and strides that change from chunk to chunk; a kernel compiled for each kind of them would be no gain.
VARYING = ("queries", "count", "bias_b", "bias_h", "visible_b", "weight_b")


@triton.jit
def _logits(product, bias, scaling, softcap, HAS_CAP: tl.constexpr):
    """Logits in powers of 2, of products of queries and keys; `scaling` has divided by `softcap` already."""
    if HAS_CAP:
        # tanh; at either end the power is 0 or infinite, which is right.
        product = 1 - 2 / (tl.exp2(product * (scaling * 2 * LOG2_E)) + 1)
        return product * (softcap * LOG2_E) + bias
    return product * (scaling * LOG2_E) + bias


@triton.jit
def _rows(first, queries, groups, query_h, query_q, visible, ROWS: tl.constexpr):
    """Which rows a block has: their numbers, whether they exist, where queries lie, how many entries they see."""
    row = first + tl.arange(0, ROWS)
    there = row < groups * queries
    place = (row // queries).to(tl.int64) * query_h + (row % queries).to(tl.int64) * query_q
    return row, there, place, tl.load(visible + row % queries, mask=there, other=0).to(tl.int32)


@triton.jit(do_not_specialize=VARYING)
def _attend(
    query,
    key,
    value,
    log_mass,
    visible,
    sinks,
    output,
    log_sum,
    queries,
    count,
    groups,
    heads,
    scaling,
    softcap,
    query_b,
    query_h,
    query_q,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    bias_b,
    bias_h,
    visible_b,
    output_b,
    output_h,
    output_q,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
):
    """Attention of ROWS rows of one key/value head: output, unless only masses are wanted, and log2 of the sums."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    query += b * query_b + h * groups * query_h
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    log_mass += b * bias_b + h * bias_h
    row, there, place, limit = _rows(
        tl.program_id(0) * ROWS, queries, groups, query_h, query_q, visible + b * visible_b, ROWS
    )
    dim, value_dim = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    q = tl.load(query + place[:, None] + dim[None, :], mask=there[:, None] & (dim < KEY_DIM)[None, :], other=0.0)
    if HAS_SINKS:
        highest = tl.load(sinks + h * groups + row // queries, mask=there, other=0.0) * LOG2_E
        total = tl.full((ROWS,), 1.0, tl.float32)
    else:
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    for first in tl.range(0, tl.minimum(count, tl.max(limit, 0)), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        held = column < count
        place_s = column.to(tl.int64)
        k = tl.load(
            key + place_s[None, :] * key_s + dim[:, None], mask=held[None, :] & (dim < KEY_DIM)[:, None], other=0.0
        )
        bias = tl.load(log_mass + column, mask=held, other=float("-inf")) * LOG2_E
        logits = _logits(tl.dot(q, k, input_precision=PRECISION), bias[None, :], scaling, softcap, HAS_CAP)
        logits = tl.where(column[None, :] < limit[:, None], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # Rows that have seen nothing yet: -inf - -inf is no number.
        from_ = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(highest - from_)
        powers = tl.exp2(logits - from_[:, None])
        total = total * shrink + tl.sum(powers, 1)
        if HAS_OUTPUT:
            v = tl.load(
                value + place_s[:, None] * value_s + value_dim[None, :],
                mask=held[:, None] & (value_dim < VALUE_DIM)[None, :],
                other=0.0,
            )
            mixed = tl.dot(powers.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
        highest = higher
    seen = total > 0
    # A row without entries gives nothing and takes no part in the second pass.
    sums = tl.where(seen, highest + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    rows = groups * queries
    tl.store(log_sum + tl.program_id(1).to(tl.int64) * rows + row, sums, mask=there)
    if HAS_OUTPUT:
        mixed = mixed / tl.where(seen, total, 1.0)[:, None]
        heads_apart = (h * groups + row // queries) * output_h + (row % queries).to(tl.int64) * output_q
        tl.store(
            output + b * output_b + heads_apart[:, None] + value_dim[None, :],
            mixed.to(output.dtype.element_ty),
            mask=there[:, None] & (value_dim < VALUE_DIM)[None, :],
        )


@triton.jit(do_not_specialize=VARYING)
def _add_columns(
    query,
    key,
    log_mass,
    visible,
    weight,
    log_sum,
    mass,
    queries,
    count,
    groups,
    heads,
    scaling,
    softcap,
    query_b,
    query_h,
    query_q,
    key_b,
    key_h,
    key_s,
    bias_b,
    bias_h,
    visible_b,
    weight_b,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Mass of COLUMNS entries of one key/value head: their probabilities, over all rows."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = groups * queries
    query += b * query_b + h * groups * query_h
    key += b * key_b + h * key_h
    log_sum += tl.program_id(1).to(tl.int64) * rows
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    held = column < count
    dim = tl.arange(0, KEY_WIDTH)
    k = tl.load(
        key + column.to(tl.int64)[:, None] * key_s + dim[None, :],
        mask=held[:, None] & (dim < KEY_DIM)[None, :],
        other=0.0,
    )
    bias = tl.load(log_mass + b * bias_b + h * bias_h + column, mask=held, other=float("-inf")) * LOG2_E
    # Added up row by row only at the end: a sum across threads costs more than an addition in each.
    probabilities = tl.zeros((COLUMNS, ROWS), tl.float32)
    for first in tl.range(0, rows, ROWS):
        row, there, place, limit = _rows(first, queries, groups, query_h, query_q, visible + b * visible_b, ROWS)
        q = tl.load(query + place[None, :] + dim[:, None], mask=there[None, :] & (dim < KEY_DIM)[:, None], other=0.0)
        sums = tl.load(log_sum + row, mask=there, other=float("inf"))
        logits = _logits(tl.dot(k, q, input_precision=PRECISION), bias[:, None], scaling, softcap, HAS_CAP)
        logits = tl.where(column[:, None] < limit[None, :], logits, float("-inf"))
        power = tl.exp2(logits - sums[None, :])
        if HAS_WEIGHT:
            power *= tl.load(weight + b * weight_b + row % queries, mask=there, other=0.0)[None, :]
        probabilities += power
    at = tl.program_id(1).to(tl.int64) * count + column
    tl.store(mass + at, tl.sum(probabilities, 1), mask=held)


def attend_and_add(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    log_mass: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Launch both passes; arguments and results are those of `kernels`, tensors of one dtype, rows without gaps.

    Args:
        query: (b h*g q d).
        key: (b h s d).
        value: (b h s v); None: no output is wanted.
        log_mass: (b h s), float32.
        visible: (b q), integers.
        scaling: Factor of the logits.
        softcap: Their cap.
        sinks: (h g), float32.
        weight: (b q), float32.

    Returns:
        The output (b q h*g v) or None, and the mass (b h s).
    """
    (b, heads, q, d), (_, h, s, _) = query.shape, key.shape
    groups = heads // h
    v = d if value is None else value.shape[-1]
    mass = torch.empty(b, h, s, dtype=torch.float32, device=query.device)
    output = None if value is None else query.new_empty(b, q, heads, v)
    if not mass.numel() or not q:
        return None if output is None else output.zero_(), mass.zero_()
    log_sum = torch.empty(b * h, groups * q, dtype=torch.float32, device=query.device)
    settings = {
        "KEY_DIM": d,
        "KEY_WIDTH": _width(d),
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
        "HAS_CAP": softcap is not None,
    }
    factors = (float(scaling / (softcap or 1.0)), float(softcap or 1.0))
    strides = (*query.stride()[:3], *key.stride()[:3])
    # Arguments that a kernel leaves alone must be tensors all the same.
    mixing = (key, key) if value is None or output is None else (value, output)
    with torch.cuda.device_of(query):
        blocks = _blocks(groups * q, b * h, max(_width(d), _width(v)), query.dtype, value is not None)
        _attend[(triton.cdiv(groups * q, blocks["ROWS"]), b * h)](
            query,
            key,
            mixing[0],
            log_mass,
            visible,
            log_mass if sinks is None else sinks,
            mixing[1],
            log_sum,
            q,
            s,
            groups,
            h,
            *factors,
            *strides,
            *mixing[0].stride()[:3],
            *log_mass.stride()[:2],
            visible.stride(0),
            q * heads * v,
            v,
            heads * v,
            VALUE_DIM=v,
            VALUE_WIDTH=_width(v) if value is not None else 16,
            HAS_SINKS=sinks is not None,
            HAS_OUTPUT=value is not None,
            **settings,
            **blocks,
        )
        blocks = _blocks(s, b * h, _width(d), query.dtype, False)
        blocks["ROWS"], blocks["COLUMNS"] = blocks["COLUMNS"], blocks["ROWS"]
        _add_columns[(triton.cdiv(s, blocks["COLUMNS"]), b * h)](
            query,
            key,
            log_mass,
            visible,
            log_mass if weight is None else weight,
            log_sum,
            mass,
            q,
            s,
            groups,
            h,
            *factors,
            *strides,
            *log_mass.stride()[:2],
            visible.stride(0),
            0 if weight is None else weight.stride(0),
            HAS_WEIGHT=weight is not None,
            **settings,
            **blocks,
        )
    return output, mass


def _width(dim: int) -> int:
    """Return how wide a block for vectors of `dim` numbers is: a power of 2, and no less than products want."""
    return max(16, 1 << (dim - 1).bit_length())


def _blocks(rows: int, heads: int, width: int, dtype: torch.dtype, mixes: bool) -> dict[str, Any]:
    """Return the size of a program's block of what it keeps (ROWS) and of what passes by (COLUMNS), and how it runs.

    Args:
        rows: To be shared out among programs.
        heads: Key/value heads of the whole batch, each with as many.
        width: Of the widest vectors.
        dtype: Of the vectors.
        mixes: Whether values pass by as well.
    """
    if dtype == torch.float32:
        # Three products of parts of each number want registers: small blocks, so that none are spilled.
        return {
            "ROWS": 32 if width <= 64 else 16,
            "COLUMNS": 32,
            "num_warps": 4,
            "num_stages": 2 if width <= 128 else 1,
        }
    large = triton.cdiv(rows, 128) * heads >= PROGRAMS and width <= 128
    small = triton.cdiv(rows, 64) * heads < PROGRAMS
    return {
        "ROWS": 128 if large else 32 if small else 64,
        "COLUMNS": 64 if width <= 128 else 32,
        "num_warps": 8 if large or (width > 128 and mixes) else 4,
        "num_stages": 3 if width <= 64 else 2,
    }
