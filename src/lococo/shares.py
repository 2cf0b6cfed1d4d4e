"""Split a total number of slots over layers."""

import math
from collections.abc import Sequence
from typing import cast

from lococo.errors import ArgumentError


def shares(weights: Sequence[float], num_slots: int, least: int, most: int | None = None) -> list[int]:
    """Split `num_slots` per layer in proportion to weights, with at least `least` each and the total kept exactly.

    Args:
        weights: Of the layers, not all 0.
        num_slots: Mean over the layers.
        least: That each gets.
        most: That each gets at most, what is over going to the others; heeded where it is not below `num_slots`.
    """
    spare = (num_slots - least) * len(weights)
    if spare < 0:
        raise ArgumentError(f"{num_slots} slots per layer cannot give every layer {least}; raise num_slots")
    free = list(range(len(weights)))
    full: list[int] = []
    while True:
        left, total = spare - len(full) * ((most or 0) - least), sum(weights[i] for i in free)
        exact = {i: left * weights[i] / total if total else left / len(free) for i in free}
        over = [i for i in free if most is not None and num_slots <= most and least + exact[i] > most]
        if not over:
            break
        full += over
        free = [i for i in free if i not in over]
    slots = {i: math.floor(share) for i, share in exact.items()}
    by_remainder = sorted(free, key=lambda i: slots[i] - exact[i])
    for i in by_remainder[: left - sum(slots.values())]:
        slots[i] += 1
    return [least + slots[i] if i in slots else cast(int, most) for i in range(len(weights))]
