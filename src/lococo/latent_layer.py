"""Slots of multi-head latent attention (DeepSeek V2 and later).

Such a model caches one latent per token, of which every head's key and value are made, and one rotated key that all
heads share. transformers hands them to the cache as "keys" and "values". To a compressor they are one key/value head:
its key is latent and rotated key side by side, its value the latent, and the queries are taken back through the layer
that expands latents, so that they can be held against these keys.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lococo.entries import Entries
from lococo.slot_layer import SlotLayer


class LatentSlotLayer(SlotLayer):
    """A buffer of latents, (b 1 s r) as `keys`, and of rotated keys, (b 1 s w) as `values`."""

    def seen_by(self, module: nn.Module, query: Tensor) -> Tensor:
        """Return queries, (b g q d), as those of latents and rotated keys, (b g q r+w).

        The module's `expand_kv` is linear, but for a bias that no softmax sees. What it makes of unit vectors is its
        matrix.
        """
        if not self.compressor.observes:
            return query
        r, w = self.keys.shape[-1], self.values.shape[-1]
        # The last row is what a bias adds.
        units = torch.eye(r + w + 1, r + w, dtype=query.dtype, device=query.device)[None, None]
        keys: Tensor = module.expand_kv(*units.split([r, w], -1))[0]  # type: ignore[operator]
        expanded = keys[:, :, :-1] - keys[:, :, -1:]
        return query @ expanded.transpose(2, 3)

    def keys_seen(self) -> Tensor:
        """Return latents and rotated keys side by side, (b 1 s r+w)."""
        return torch.cat([self.keys, self.values], -1)

    def entries(self, rows: list[int], count: int) -> Entries:
        """Return the first `count` entries of rows that hold as many."""
        cached = super().entries(rows, count)
        return replace(cached, keys=torch.cat([cached.keys, cached.values], -1), values=cached.keys)

    def _store(self, rows: list[int], entries: Entries) -> None:
        # Merging has averaged the latents as values; of the key the rotated part stays what it was.
        rotated = entries.keys[..., entries.values.shape[-1] :]
        super()._store(rows, replace(entries, keys=entries.values, values=rotated))
