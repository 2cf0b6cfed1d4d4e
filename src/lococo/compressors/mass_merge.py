"""Merge dropped values into the most similar kept entry, which then carries their attention mass."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lococo.entries import Entries

# Cosine by which the last entry is preferred to the first: far above rounding, far below what tells keys apart.
TIE_BREAK = 0.01


@dataclass(frozen=True)
class MassMerge:
    """Every dropped entry goes to the kept one with the most similar key.

    The slot keeps its key, takes the average of the values weighted by future mass, and adds to its attention logit the
    logarithm of how much more mass it now stands for. Without that term merging loses to eviction (docs/log.md).

    Attributes:
        max_log_mass: Upper bound of a slot's log_mass.
    """

    max_log_mass: float = 3.0
    observes: frozenset[str] = frozenset({"queries"})

    def __call__(self, entries: Entries, kept: Tensor, scores: Tensor, layer_idx: int) -> Entries:
        """Return the kept entries with the others merged into them."""
        m, d = kept.shape[-1], entries.values.shape[-1]
        slots = entries.take(kept)
        mass = entries.future_mass.clamp(min=1e-9)
        directions = torch.nn.functional.normalize(entries.unrotated_keys().float(), dim=-1)
        anchors = directions.gather(2, kept[..., None].expand(-1, -1, -1, directions.shape[-1]))
        similarity = torch.einsum("bhsd,bhmd->bhsm", directions, anchors)
        # The same token twice has the same key in the first layer: the later one is taken, not what rounding prefers.
        anchor = (similarity + TIE_BREAK * kept[:, :, None] / len(entries)).argmax(-1)
        # A kept entry is its own anchor, even where another one's key is the same.
        anchor.scatter_(2, kept, torch.arange(m, device=kept.device).expand_as(kept))

        total = torch.zeros_like(mass[..., :m]).scatter_add_(2, anchor, mass)
        weighted = torch.zeros_like(slots.values, dtype=torch.float32)
        weighted = weighted.scatter_add(
            2, anchor[..., None].expand(-1, -1, -1, d), entries.values.float() * mass[..., None]
        )
        gained = (total / mass.gather(2, kept)).log()
        return replace(
            slots,
            values=(weighted / total[..., None]).to(entries.values.dtype),
            log_mass=(slots.log_mass + gained).clamp(max=self.max_log_mass),
            mass=None if entries.mass is None else torch.zeros_like(total).scatter_add_(2, anchor, entries.mass),
        )
