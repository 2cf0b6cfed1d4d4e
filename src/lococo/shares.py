"""Split a total number of slots over layers."""

import math
from collections.abc import Sequence

from lococo.errors import ArgumentError


def shares(weights: Sequence[float], num_slots: int, least: int) -> list[int]:
    """Split `num_slots` per layer in proportion to weights, with at least `least` each and the total kept exactly."""
    total = num_slots * len(weights)
    spare = total - least * len(weights)
    if spare < 0:
        raise ArgumentError(f"{num_slots} slots per layer cannot give every layer {least}; raise num_slots")
    exact = [spare * weight / sum(weights) for weight in weights]
    slots = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: slots[i] - exact[i])
    for i in by_remainder[: spare - sum(slots)]:
        slots[i] += 1
    return [least + share for share in slots]
