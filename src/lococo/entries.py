"""What one layer hands to a compressor, and the attention mass read off it."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from lococo import kernels, loops
from lococo.fast import fast
from lococo.rope import LayerRotary

# Rows of an attention map that are held at once: (b h QUERY_ROWS s) floats.
QUERY_ROWS = 384

# Of a chunk of n times as many, every n-th query of each of n or more groups looks ahead.
LOOK_AHEAD_QUERIES = 256

# Least length of a key or value that is divided by it.
TINY = 1e-12

# Floats of the widest vectors that processors have.
LANES = 16


@dataclass(frozen=True)
class Entries:
    """The entries of one layer, in temporal order and without padding.

    Attributes:
        keys: After RoPE at `positions`, (b h s d).
        values: (b h s d).
        positions: Where the keys are rotated to, (b h s), float32; fractional for a slot between tokens.
        log_mass: Logarithm of how many tokens an entry stands for, added to its attention logit, (b h s), float32.
        token_index: Which token of the text an entry is (for a merged slot: its anchor), (b h s), int64.
        mass: Attention mass received since the entry came, summed over queries and query groups, (b h s), float32;
            None unless the compressor observes "mass".
        remembered: What earlier compressions made of each entry, (b h s), float32; 0 for those that came since, None
            unless the compressor observes "remembered", and then it says with the slots what is to be remembered.
        queries: Queries of the last w tokens after RoPE, oldest first, (b h g w d); they belong to the last w entries.
            None unless the compressor observes "queries".
        rotary: Rotates this layer's keys and queries.
        scaling: Factor of the attention logits, usually 1 / sqrt(d).
        softcap: Gemma 2's cap of the attention logits, or None.
        sinks: gpt-oss' logits that take attention away from all entries, (h g), or None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    log_mass: Tensor
    token_index: Tensor
    mass: Tensor | None
    queries: Tensor | None
    rotary: LayerRotary
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    remembered: Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[2]

    def take(self, index: Tensor) -> "Entries":
        """Return the entries at `index` (b h m), which must ascend along m to keep the temporal order."""
        rows = flat_index(index, len(self))
        return replace(
            self,
            keys=rows_at(self.keys, rows),
            values=rows_at(self.values, rows),
            positions=self.positions.gather(2, index),
            log_mass=self.log_mass.gather(2, index),
            token_index=self.token_index.gather(2, index),
            mass=None if self.mass is None else self.mass.gather(2, index),
            remembered=None if self.remembered is None else self.remembered.gather(2, index),
        )

    @cached_property
    def unrotated_keys(self) -> Tensor:
        """The keys as they were before RoPE, (b h s d)."""
        return self.rotary.rotate(self.keys, -self.positions)

    @cached_property
    def key_directions(self) -> Tensor:
        """The keys before RoPE, each of length 1, (b h s d), float32, without gradient."""
        # Not of the keys' dtype in between: rounding would make lengths, and with them cosines, differ from key to key.
        return self.rotary.rotate(self.keys.detach().float(), -self.positions) / self.key_norms[..., None]

    @cached_property
    def key_norms(self) -> Tensor:
        """The keys' lengths, (b h s), float32, without gradient; never 0."""
        return _lengths(self.keys)

    @cached_property
    def value_norms(self) -> Tensor:
        """The values' lengths, (b h s), float32, without gradient; never 0."""
        return _lengths(self.values)

    def chunk_mass(self, last: int | None = None) -> Tensor:
        """Return the mass that the last chunk's own (causal) attention gave each entry, (b h s).

        Args:
            last: Count only this many of the latest queries; None counts all that were observed.
        """
        queries = self._observed_queries()
        if last is not None:
            queries = queries[..., -last:, :]
        seen = torch.arange(len(self) - queries.shape[3], len(self), device=queries.device) + 1
        return attention_mass(
            self.keys,
            self.log_mass,
            queries,
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=self.sinks,
            visible=seen[None],
        )

    @cached_property
    def future_mass(self) -> Tensor:
        """Mass that the last chunk's queries would give from one chunk later, (b h s).

        The queries of the next chunk are unknown; those of the last one, rotated that many positions ahead and freed of
        the causal mask, are their best stand-in. All of them: some alone miss what the others would have kept.
        Of long chunks every n-th, see LOOK_AHEAD_QUERIES, each group its own, so that no token goes unasked
        (docs/log.md).
        """
        queries = self._observed_queries()
        groups, w, d = queries.shape[2:]
        queries = _every(max(1, min(groups, w // LOOK_AHEAD_QUERIES)), queries)
        # Keys that move back look to queries as if these had moved ahead, and are fewer.
        back = self.rotary.matrix(-float(w), d, queries.device) * self.scaling
        keys = self.keys.detach().float() @ back
        return attention_mass(keys, self.log_mass, queries, scaling=1.0, softcap=self.softcap, sinks=self.sinks)

    def _observed_queries(self) -> Tensor:
        assert self.queries is not None, "a compressor that reads queries must declare it in `observes`"
        return self.queries


def _every(step: int, queries: Tensor) -> Tensor:
    """Return every step-th of queries (b h g w d): of the first group the last one, of the next that before it."""
    if step == 1:
        return queries
    parts = queries[:, :, :, queries.shape[3] % step :].unflatten(3, (-1, step))
    return torch.stack([parts[:, :, group, :, -1 - group % step] for group in range(queries.shape[2])], 2)


def _lengths(vectors: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors.detach().float(), dim=-1)
    return lengths.clamp(min=TINY)


def rows_at(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of (b h s d) at a `flat_index`, as (b h m d); copies rows whole, which gather does not."""
    b, h, _, d = tensor.shape
    return tensor.reshape(-1, d).index_select(0, rows).view(b, h, -1, d)


def flat_index(index: Tensor, s: int) -> Tensor:
    """Return where the rows at `index` (b h m) of a (b h s d) tensor lie once b, h and s are one dimension."""
    b, h, _ = index.shape
    return (index + torch.arange(0, b * h * s, s, device=index.device).view(b, h, 1)).flatten()


@torch.no_grad()
def attention_mass(
    keys: Tensor,
    log_mass: Tensor,
    queries: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum the attention probabilities that queries give each entry.

    Args:
        keys: Entries attended to, after RoPE, (b h s d).
        log_mass: Added to their logits, (b h s).
        queries: After RoPE, (b h g q d).
        scaling: Factor of the logits.
        softcap: Gemma 2's cap of the logits.
        sinks: Logits beside those of the entries, that belong to none of them, (h g).
        visible: How many leading entries each query sees, (b q) or (1 q); None: all of them.
        weight: Factor of each query's probabilities, (b q); 0 leaves a padded query out.

    Returns:
        Column sums over queries and groups, (b h s), float32; they add up to g * q per key/value head, less what sinks
        take.
    """
    if fast() and softcap is None and sinks is None and loops.sums(queries):
        return loops.column_mass(keys, log_mass, queries, scaling=scaling, visible=visible, weight=weight)
    # The same sums without a map, where a GPU has them.
    compute = kernels.column_mass if kernels.usable(keys, queries) else mass_in_blocks
    return compute(
        keys, log_mass, queries, scaling=scaling, softcap=softcap, sinks=sinks, visible=visible, weight=weight
    )


def mass_in_blocks(
    keys: Tensor,
    log_mass: Tensor,
    queries: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Compute `attention_mass` from maps of QUERY_ROWS rows, in plain torch; without gradients.

    Queries in bfloat16 have their maps in bfloat16 on a CPU, where products of such matrices are twice as fast
    (docs/log.md).
    """
    b, h, g, q, d = queries.shape
    half = queries.dtype == torch.bfloat16 and queries.device.type == "cpu" and fast()
    dtype = torch.bfloat16 if half else torch.float32
    count = keys.shape[2]
    # Rows that do not end where a vector ends cost a tenth more (docs/log.md): the rest is entries that nobody sees.
    # A single query gains nothing by it.
    rest = -count % LANES if g * q > LANES else 0
    s = count + rest
    if rest:
        keys, log_mass = pad(keys, (0, 0, 0, rest)), pad(log_mass, (0, rest), value=-torch.inf)
    # Every group's queries in one row of blocks, each small enough for its map to stay in the processor's cache.
    rows = queries.to(dtype).reshape(b * h, g * q, d)
    rows = rows if scaling == 1 else rows * scaling
    transposed = keys.to(dtype).reshape(b * h, s, d).transpose(1, 2)
    bias = log_mass.reshape(b * h, 1, s).to(dtype)
    mass = log_mass.new_zeros(b * h, s)
    columns = torch.arange(s, device=keys.device)
    map_ = bias.new_empty(b * h, min(QUERY_ROWS, g * q), s)
    ones = bias.new_ones(b * h, 1, map_.shape[1])
    for start in range(0, g * q, QUERY_ROWS):
        block = rows[:, start : start + QUERY_ROWS]
        logits = map_[:, : block.shape[1]]
        if softcap is None:
            torch.baddbmm(bias, block, transposed, out=logits)
        else:
            torch.bmm(block, transposed, out=logits).div_(softcap).tanh_().mul_(softcap).add_(bias)
        which = torch.arange(start, start + block.shape[1], device=keys.device) % q
        if visible is not None:
            hidden = columns >= visible[:, which, None]
            logits.view(b, h, *logits.shape[1:]).masked_fill_(hidden[:, None], -torch.inf)
        left = None
        if sinks is not None:
            taken = (
                sinks[:, torch.arange(start, start + block.shape[1], device=sinks.device) // q]
                .expand(b, -1, -1)
                .flatten(0, 1)
            )
            left = (logits.logsumexp(-1) - taken).sigmoid()
        probabilities = torch.softmax(logits, -1, out=logits)
        if left is not None:
            probabilities.mul_(left[..., None])
        if weight is not None:
            probabilities.view(b, h, *logits.shape[1:]).mul_(weight[:, None, which, None])
        # A product adds in float32 what is in half precision.
        mass += torch.bmm(ones[..., : block.shape[1]], probabilities)[:, 0] if half else probabilities.sum(1)
    return mass.view(b, h, s)[..., :count]
