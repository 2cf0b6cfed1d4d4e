"""Selections: which entries stay. One small function each, all of the signature entries -> (b h s) scores."""

import torch
from torch import Tensor

from lococo.entries import Entries

# Last entries that stay whatever their mass, which is not known yet; more take room from others (docs/log.md).
RECENT = 8


def recency(entries: Entries) -> Tensor:
    """Score later entries higher: with sinks, StreamingLLM (arXiv 2309.17453)."""
    return torch.arange(len(entries), dtype=torch.float32, device=entries.keys.device).expand(entries.positions.shape)


def accumulated_mass(entries: Entries) -> Tensor:
    """Score by all attention received so far: H2O (arXiv 2306.14048)."""
    assert entries.mass is not None, "a compressor that reads the mass must declare it in `observes`"
    return entries.mass


def last_query_mass(entries: Entries) -> Tensor:
    """Score by the last token's attention, averaged over heads, so that all keep the same: TOVA (arXiv 2401.06104)."""
    return entries.chunk_mass(last=1).mean(1, keepdim=True)


def window_mass(entries: Entries, window: int = 32, kernel: int = 5) -> Tensor:
    """Score by the attention of the last `window` queries, max-pooled over neighbours: SnapKV (arXiv 2404.14469)."""
    mass = entries.chunk_mass(last=window)
    return torch.nn.functional.max_pool1d(mass, kernel, stride=1, padding=kernel // 2)


def chunk_mass(entries: Entries) -> Tensor:
    """Score by the attention of the last chunk's queries, as the LoCoCo authors' code does (arXiv 2406.05317)."""
    return entries.chunk_mass()


def future_mass(entries: Entries) -> Tensor:
    """Score by the attention that the last chunk's queries would give from one chunk later."""
    return entries.future_mass
