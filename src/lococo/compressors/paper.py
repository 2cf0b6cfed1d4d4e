"""The convolution heads of the LoCoCo paper (arXiv 2406.05317), as a merge.

Half of the slots keep the entries with the highest scores verbatim; each of the others is W K and W V, a mixture of the
rest, W = (1 - n) R + n softmax(conv([K; V])): R picks the entry with the next-highest score, n is one number per layer.
With n = 0, the default start, this is plain top-M eviction, whatever the convolution says.

Deviations from the authors' code: slots stay in temporal order; no ReLU under the softmax, which floored its logits;
the convolution starts small, so that the softmax is not saturated; biases are saved with the rest.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lococo.entries import Entries
from lococo.errors import ArgumentError


class PaperHeads(nn.Module):
    """One convolution per layer, shared by its key/value heads."""

    kind = "lococo-paper"
    observes: frozenset[str] = frozenset()

    def __init__(
        self,
        slots_per_layer: dict[int, int],
        head_dim: int,
        *,
        kernel_size: int = 21,
        heavy_share: float = 0.5,
        mix: float = 0.0,
        unrotated: bool = False,
    ) -> None:
        """Make heads that equal top-M eviction until `mix` is trained.

        Args:
            slots_per_layer: Number of slots by layer index; fixes the output channels.
            head_dim: Size of a key and of a value.
            kernel_size: Entries a convolution sees, odd.
            heavy_share: Share of the slots that stay verbatim. At 0 all slots are mixtures and the parameters are
                those the paper counts: num_slots * 2 * head_dim * kernel_size per layer.
            mix: Start of n.
            unrotated: Mix keys before RoPE rather than after it, as the paper does.
        """
        super().__init__()
        if kernel_size % 2 == 0 or not 0 <= heavy_share < 1:
            raise ArgumentError(
                f"expected an odd kernel size and a heavy share in [0, 1), got {kernel_size} and {heavy_share}"
            )
        self.slots_per_layer = dict(slots_per_layer)
        self.heavy_share = heavy_share
        self.unrotated = unrotated
        self.convolutions = nn.ModuleDict()
        self.mix = nn.ParameterDict()
        for layer_idx, slots in slots_per_layer.items():
            mixtures = slots - int(slots * heavy_share)
            convolution = nn.Conv1d(2 * head_dim, mixtures, kernel_size, padding=kernel_size // 2)
            nn.init.normal_(convolution.weight, std=(2 * head_dim * kernel_size) ** -0.5)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # bias=True
            self.convolutions[str(layer_idx)] = convolution
            self.mix[str(layer_idx)] = nn.Parameter(torch.tensor(mix))

    @property
    def settings(self) -> dict[str, object]:
        """What `__init__` needs to make the same heads again, as JSON takes it."""
        convolution = next(iter(self.convolutions.values()))
        assert isinstance(convolution, nn.Conv1d)
        return {
            "slots_per_layer": {str(key): value for key, value in self.slots_per_layer.items()},
            "head_dim": convolution.in_channels // 2,
            "kernel_size": convolution.kernel_size[0],
            "heavy_share": self.heavy_share,
            "unrotated": self.unrotated,
        }

    @classmethod
    def of_settings(cls, settings: dict[str, Any]) -> "PaperHeads":
        """Make heads of their `settings`."""
        slots = {int(layer): count for layer, count in settings["slots_per_layer"].items()}
        return cls(**settings | {"slots_per_layer": slots})

    def mismatch(self, slots_per_layer: dict[int, int], head_dim: int) -> str:
        """Say what they were made for and what is asked for, where the two differ."""
        convolution = next(iter(self.convolutions.values()))
        assert isinstance(convolution, nn.Conv1d)
        mine = (convolution.in_channels // 2, self.slots_per_layer)
        if mine == (head_dim, slots_per_layer):
            return ""
        return "{}, but {} were asked for".format(
            *(f"head_dim {d} and slots {_brief(slots)}" for d, slots in (mine, (head_dim, slots_per_layer)))
        )

    def weights(self, entries: Entries, heavy: Tensor, layer_idx: int) -> Tensor:
        """Return the mixing weights of the convolution, (b h mixtures s), rows summing to 1.

        Args:
            entries: All s entries.
            heavy: Which of them stay verbatim and take no part, (b h s) bool.
            layer_idx: The layer.
        """
        b, h, s, _ = entries.keys.shape
        keys = entries.unrotated_keys if self.unrotated else entries.keys
        both = torch.cat([keys, entries.values], -1).float().reshape(b * h, s, -1).transpose(1, 2)
        logits: Tensor = self.convolutions[str(layer_idx)](both)
        return logits.view(b, h, -1, s).masked_fill(heavy[:, :, None], -torch.inf).softmax(-1)

    def __call__(self, entries: Entries, kept: Tensor, scores: Tensor, layer_idx: int) -> Entries:
        """Return the heavy hitters as they are and, in the places of the others, mixtures."""
        m, s = kept.shape[-1], len(entries)
        if self.slots_per_layer.get(layer_idx) != m:
            raise ArgumentError(
                f"these heads have {self.slots_per_layer.get(layer_idx, 'no')} slots in layer {layer_idx}, "
                f"but {m} were asked for; use the number they were made for"
            )
        # Rank within the kept ones; infinite scores (protected entries) come first.
        order = scores.gather(2, kept).sort(dim=-1, descending=True, stable=True).indices
        places = order[..., int(m * self.heavy_share) :].sort(-1).values
        anchors = kept.gather(2, places)
        stays = kept.gather(2, order[..., : int(m * self.heavy_share)])
        heavy = torch.zeros(scores.shape, dtype=torch.bool, device=kept.device).scatter_(2, stays, True)

        n = self.mix[str(layer_idx)]
        one_hot = nn.functional.one_hot(anchors, s).float()
        weights = (1 - n) * one_hot + n * self.weights(entries, heavy, layer_idx)
        values = weights @ entries.values.float()
        if self.unrotated:
            positions = (weights @ entries.positions[..., None])[..., 0]
            keys = entries.rotary.rotate(weights @ entries.unrotated_keys.float(), positions)
        else:
            positions = entries.positions.gather(2, anchors)
            keys = weights @ entries.keys.float()
        slots = entries.take(kept)
        index = places[..., None]
        return replace(
            slots,
            keys=slots.keys.scatter(2, index.expand_as(keys), keys.to(slots.keys.dtype)),
            values=slots.values.scatter(2, index.expand_as(values), values.to(slots.values.dtype)),
            positions=slots.positions.scatter(2, places, positions.to(slots.positions.dtype)),
        )


def _brief(slots_per_layer: dict[int, int]) -> str:
    counts = set(slots_per_layer.values())
    return f"{counts.pop()} in each of {len(slots_per_layer)} layers" if len(counts) == 1 else str(slots_per_layer)
