"""Merge dropped values into the most similar kept entry, which then carries their attention mass."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lococo.entries import Entries, flat_index, rows_at

# Cosine by which the last entry is preferred to the first: far above rounding, far below what tells keys apart.
TIE_BREAK = 0.01

# Numbers among which the largest is looked for at a time.
BLOCK = 32

# A slot stands for at most this many times its own mass, as a logarithm.
MAX_LOG_MASS = 3.0


@dataclass(frozen=True)
class MassMerge:
    """Every dropped entry goes to the kept one with the most similar key; see `merged_by_mass`.

    Attributes:
        max_log_mass: Upper bound of a slot's log_mass.
    """

    max_log_mass: float = MAX_LOG_MASS
    observes: frozenset[str] = frozenset({"queries"})

    def __call__(self, entries: Entries, kept: Tensor, scores: Tensor, layer_idx: int) -> Entries:
        """Return the kept entries with the others merged into them."""
        return merged_by_mass(entries, kept, entries.future_mass, max_log_mass=self.max_log_mass)


def merged_by_mass(
    entries: Entries,
    kept: Tensor,
    mass: Tensor,
    *,
    gain: Tensor | None = None,
    max_log_mass: float = MAX_LOG_MASS,
) -> Entries:
    """Return the kept entries with the others merged into them.

    The slot keeps its key, takes the average of the values weighted by mass, and adds to its attention logit the
    logarithm of how much more mass it now stands for. Without that term merging loses to eviction (docs/log.md).

    Args:
        entries: All s of them.
        kept: Which stay, ascending, (b h m).
        mass: What each entry weighs, (b h s).
        gain: Added to the log_mass of those that stay, (b h s).
        max_log_mass: Upper bound of a slot's log_mass.

    Returns:
        m entries.
    """
    slots = entries.take(kept)
    mass = mass.clamp(min=1e-9)
    gone = others(kept, len(entries))
    rows = flat_index(gone, len(entries))
    anchor = _anchors(entries, rows, kept)

    own = mass.gather(2, kept)
    share = mass.gather(2, gone)
    total = own.scatter_add(2, anchor, share)
    weighted = (slots.values.float() * own[..., None]).flatten(0, 2)
    added = (rows_at(entries.values, rows).float() * share[..., None]).flatten(0, 2)
    weighted = weighted.index_add(0, flat_index(anchor, kept.shape[-1]), added).view_as(slots.values)
    log_mass = slots.log_mass + (total / own).log()
    if gain is not None:
        log_mass = log_mass + gain.gather(2, kept)
    return replace(
        slots,
        values=(weighted / total[..., None]).to(entries.values.dtype),
        log_mass=log_mass.clamp(max=max_log_mass),
        mass=None if slots.mass is None else _summed(entries, slots, gone, anchor),
    )


def others(kept: Tensor, count: int) -> Tensor:
    """Return which of `count` entries are not among those kept, (b h m), ascending, (b h count - m)."""
    b, h, m = kept.shape
    which = torch.ones(b, h, count, dtype=torch.bool, device=kept.device).scatter_(2, kept, False)
    if which.device.type == "cpu":
        return which.nonzero()[:, 2].view(b, h, -1)
    # How many there are is known, but `nonzero` makes the CPU wait until a GPU has counted them.
    return which.byte().argsort(dim=-1, descending=True, stable=True)[..., : count - m]


def _anchors(entries: Entries, gone: Tensor, kept: Tensor) -> Tensor:
    """Return which of the kept entries, (b h m), each of those that go, a `flat_index`, is most similar to."""
    s = len(entries)
    from_there, to_here = (rows_at(entries.key_directions, rows) for rows in (gone, flat_index(kept, s)))
    # The same token twice has the same key in the first layer: the later one is taken, not what rounding prefers.
    later = (TIE_BREAK / s) * kept[:, :, None]
    similarity = torch.baddbmm(later.flatten(0, 1), from_there.flatten(0, 1), to_here.flatten(0, 1).transpose(1, 2))
    return largest(similarity).view(*kept.shape[:2], -1)


def largest(rows: Tensor) -> Tensor:
    """Return where each row of (n r c) is largest, (n r); as `argmax(-1)`, which reads every number one by one."""
    n, r, c = rows.shape
    if c % BLOCK:
        rows = pad(rows, (0, -c % BLOCK), value=-torch.inf)
    blocks = rows.view(n, r, -1, BLOCK)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    within = blocks.gather(2, block[..., None].expand(n, r, 1, BLOCK)).argmax(-1)
    return (block * BLOCK + within).squeeze(-1)


def _summed(entries: Entries, slots: Entries, gone: Tensor, anchor: Tensor) -> Tensor:
    assert entries.mass is not None
    assert slots.mass is not None
    return slots.mass.scatter_add(2, anchor, entries.mass.gather(2, gone))
