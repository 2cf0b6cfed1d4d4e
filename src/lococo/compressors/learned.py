"""Our heads: small convolutions over the temporal order of entries that correct what look-ahead sees.

Look-ahead mass and merging by mass are where they start from, and with weights of zero and no memory they are exactly
`mass-merge`. Two nets per layer look at each entry and its neighbours: one raises the mass of entries that somebody may
ask for much later, which the last queries cannot know; the other corrects how much an entry weighs when values are
merged and how much attention its slot asks for. Nothing depends on the number of slots, so one set serves any.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from lococo.compressors.mass_merge import merged_by_mass
from lococo.compressors.nets import HeadSettings, Joining, Net
from lococo.compressors.selections import RECENT
from lococo.entries import Entries
from lococo.norms import NormDeltas
from lococo.rope import lasting
from lococo.shares import shares

# Of an entry's mass (in units of the mean), its key's norm, its value's norm and its age: the least that a logarithm is
# taken of, and what it is multiplied by.
LOGARITHMS = (1e-4, 1e-6, 1e-6, 1.0), (1 / 2, 1 / 2, 1 / 2, 1 / 4)

# Slots of a layer from which on scorers count in full; with fewer, keeping what may be asked for costs more than it
# gains, and they count less by the third power (docs/log.md).
FULL_SCORES_SLOTS = 256

# Share of the slots that scorers decide about, at most. Look-ahead mass decides about the others, or long texts fill
# all slots with what nobody ever asks for (docs/log.md).
SCORED_SHARE = 0.25

# Where a scorer's softplus starts: nearly flat, so that entries which nobody asks for keep the mass they have.
BONUS_START = -4.0
BONUS_AT_0: float = nn.functional.softplus(torch.tensor(BONUS_START)).item()

OnCompress = Callable[[int, Entries, int], Tensor | None]


class LearnedHeads(nn.Module):
    """The compressor `lococo`."""

    kind = "lococo"
    # Raised whenever the same weights do something else than before; see `compressors.METHODS`.
    revision = 1

    def __init__(self, form: HeadSettings, name: str = "lococo") -> None:
        super().__init__()
        self.form = form
        self.name = name
        layers = [str(layer_idx) for layer_idx in form.layers]
        self.scorers = nn.ModuleDict({layer: Net(form, 1) for layer in layers if form.learned_scores})
        self.mergers = nn.ModuleDict({layer: Net(form, 2) for layer in layers if form.learned_merge})
        self.norms = NormDeltas(list(form.norms), form.hidden_size) if form.norms else None
        self._joining = Joining()
        # Shown every layer's entries, and how many stay, before they are compressed; what it returns, (b h s), is the
        # least mass that they have.
        self.on_compress: OnCompress | None = None

    @property
    def observes(self) -> frozenset[str]:
        """Queries, and with memory what it said before."""
        return frozenset({"queries", "remembered"} if self.form.memory else {"queries"})

    @property
    def settings(self) -> dict[str, Any]:
        """What `of_settings` needs to make the same heads again, as JSON takes it."""
        made = asdict(self.form) | {"layers": list(self.form.layers), "norms": list(self.form.norms)}
        # Heads that have no memory are what they were before there was any.
        return made if self.form.memory else {name: value for name, value in made.items() if name != "memory"}

    @classmethod
    def of_settings(cls, settings: dict[str, Any]) -> "LearnedHeads":
        """Make heads of their `settings`."""
        budgets = {int(slots): list(weights) for slots, weights in settings["budgets"].items()}
        form = HeadSettings(**settings | {"budgets": budgets})
        if not 0 <= form.memory < 1:
            raise ValueError(f"expected memory from 0 to less than 1, got {form.memory}")
        for slots, weights in budgets.items():
            known = all(0 <= weight < math.inf for weight in weights) and any(weights)
            if len(weights) != len(form.layers) or not known:
                raise ValueError(f"expected {len(form.layers)} shares of {slots} slots, not all 0, got {weights}")
        return cls(form)

    def mismatch(self, slots_per_layer: dict[int, int], head_dim: int) -> str:
        """Say what they were made for and what is asked for, where the two differ."""
        mine, theirs = (self.form.head_dim, list(self.form.layers)), (head_dim, sorted(slots_per_layer))
        return (
            ""
            if mine == theirs
            else "head_dim {} and layers {}, not for head_dim {} and layers {}".format(*mine, *theirs)
        )

    def min_slots(self) -> int:
        """Return the smallest number of slots it can fill."""
        return RECENT + 1

    def slots_per_layer(self, num_slots: int, most: int | None = None) -> list[int]:
        """Return the slots of each layer, of mean `num_slots`, and where that can be of no more than `most`."""
        return shares(self._weights(num_slots), num_slots, min(num_slots, self.min_slots()), most)

    def compress(self, entries: Entries, num_slots: int, layer_idx: int) -> Entries:
        """Keep the `num_slots` entries that later queries will attend to most, and merge the others into them."""
        least = None if self.on_compress is None else self.on_compress(layer_idx, entries, num_slots)
        mass = entries.future_mass.clamp(min=1e-9)
        bonus, correction = self._said(entries, mass, str(layer_idx))
        if least is not None:
            mass = mass.maximum(least)
        wanted, remembered = self._wanted(entries, mass.detach())  # which entries stay is no smooth choice
        scores = wanted.clone()
        scores[..., len(entries) - RECENT :].fill_(torch.inf)
        if bonus is not None:
            ahead, mass = mass, raised(mass, bonus[0], num_slots)
            foreseen = scores.topk(num_slots - int(SCORED_SHARE * num_slots), sorted=False).indices
            raising = mass.detach() if remembered is None else wanted + (mass - ahead).detach()
            scores = scores.maximum(raising).scatter_(2, foreseen, torch.inf)
        kept = scores.topk(num_slots, sorted=False).indices.sort().values
        gain = None
        if correction is not None:
            weight, gain = correction
            mass = mass * weight.exp()
            # Once, when an entry becomes a slot: what is added at every compression has no end (docs/log.md).
            gain = gain * (entries.log_mass == 0) if self.form.max_log_mass else None
        slots = merged_by_mass(entries, kept, mass, gain=gain, max_log_mass=self.form.max_log_mass)
        return slots if remembered is None else replace(slots, remembered=remembered.gather(2, kept))

    def _wanted(self, entries: Entries, mass: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return how much each entry is wanted, in units of `mass`, and which share of it is to be remembered, (b h s).

        What the last queries look for is one sample of what is needed: an entry that was wanted chunks ago, and will be
        again, has a say by what is remembered of it (docs/log.md).
        """
        if entries.remembered is None:
            return mass, None
        total = mass.sum(-1, keepdim=True)
        now, before = mass / total, entries.remembered
        share = now.lerp(before, self.form.memory).where(before > 0, now)
        return share * total, share

    def corrections(self, entries: Entries, layer_idx: int) -> dict[str, Tensor]:
        """Return what is said about a layer's entries, (b h s) each.

        Returns:
            "bonus", what the scorer adds to an entry's mass in units of the mean, before it is weakened for few slots;
            "weight", the logarithm of what the merger multiplies its mass by; "gain", what it adds to its log_mass.
        """
        bonus, correction = self._said(entries, entries.future_mass.clamp(min=1e-9), str(layer_idx))
        said = {} if bonus is None else {"bonus": bonus_of(bonus[0])}
        return said if correction is None else said | {"weight": correction[0], "gain": correction[1]}

    def _said(self, entries: Entries, mass: Tensor, layer: str) -> list[Tensor | None]:
        """Return what the layer's scorer and merger say, (1 b h s) and (2 b h s), None for one that is not there."""
        both = (self.scorers, self.mergers)
        there = [cast(Net, nets[layer]) for nets in both if layer in nets]
        said = iter(self._joining(there)(content_of(entries), facts_of(entries, mass)) if there else ())
        return [next(said) if layer in nets else None for nets in both]

    def _weights(self, num_slots: int) -> list[float]:
        """Interpolate the layers' weights between the numbers of slots that they were measured at."""
        known = sorted(self.form.budgets)
        if not known:
            return [1.0] * len(self.form.layers)
        below = max([m for m in known if m <= num_slots], default=known[0])
        above = min([m for m in known if m >= num_slots], default=known[-1])
        share = 0.0 if above == below else math.log(num_slots / below) / math.log(above / below)
        pairs = zip(self.form.budgets[below], self.form.budgets[above], strict=True)
        return [low ** (1 - share) * high**share for low, high in pairs]


def raised(mass: Tensor, bonus: Tensor, num_slots: int) -> Tensor:
    """Add to the mass of entries, (b h s), what a scorer says, in units of the mean; nothing where it says 0."""
    strength = min(1.0, num_slots / FULL_SCORES_SLOTS) ** 3
    return (mass + strength * mass.mean(-1, keepdim=True) * bonus_of(bonus)).clamp(min=1e-9)


def bonus_of(said: Tensor) -> Tensor:
    """Return what a scorer's output adds, in units of the mean mass: nearly nothing below 0."""
    return nn.functional.softplus(said + BONUS_START) - BONUS_AT_0


def content_of(entries: Entries) -> Tensor:
    """Return the directions of keys (before RoPE) and values, each of length 1, (b h s 2d)."""
    values = entries.values.detach().float() / entries.value_norms[..., None]
    return torch.cat([entries.key_directions, values], -1)


@cache
def logarithms(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return LOGARITHMS on a device, (4 1 1 1) each: copied there once, since a GPU makes the CPU wait for a copy."""
    with lasting():
        least, scale = (torch.tensor(each, device=device).view(4, 1, 1, 1) for each in LOGARITHMS)
    return least, scale


def facts_of(entries: Entries, mass: Tensor) -> Tensor:
    """Return what is known of each entry beside its content, all of order 1, (b h s FACTS)."""
    s = len(entries)
    positions = entries.positions.detach()
    age = positions[..., -1:] - positions
    w = entries.queries.shape[3] if entries.queries is not None else s
    relative = mass * (s / mass.sum(-1, keepdim=True))
    sizes = torch.stack([relative, entries.key_norms, entries.value_norms, age + 1])
    least, scale = logarithms(mass.device)
    weight, key, value, since = (sizes.maximum(least).log() * scale).unbind()
    near, far = (age / -32).exp(), (age >= w).float()
    return torch.stack([weight, entries.log_mass.detach(), since, near, far, key, value], -1)
