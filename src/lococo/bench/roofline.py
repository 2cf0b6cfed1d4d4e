"""What this machine could do at best, measured beside what it does: bandwidth for decoding, arithmetic for reading."""

import time
from statistics import median

ROUNDS = 5

# Bytes of a block that no cache of a processor holds, and rows of square matrices that keep all its cores busy.
BLOCK = 512 << 20
ROWS = 1536


def machine(dtype: str, device: str | None) -> dict[str, float]:
    """Measure how fast memory is read, and how fast matrices are multiplied.

    Args:
        dtype: Of the matrices.
        device: Where; None for the CPU.

    Returns:
        bytes_per_s and operations_per_s (a multiplication and an addition are two), medians.
    """
    import torch

    block = torch.ones(BLOCK // 4, device=device)
    rows = torch.ones(ROWS, ROWS, dtype=getattr(torch, dtype), device=device)
    accelerator = block.device.type != "cpu"

    def seconds(work: "object") -> float:
        times = []
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            if accelerator:
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return median(times[1:])

    read = seconds(block.sum)
    multiplied = seconds(lambda: rows @ rows)
    return {"bytes_per_s": BLOCK / read, "operations_per_s": 2 * ROWS**3 / multiplied}


def share_of(figure: str) -> str:
    """Return the name of the share of its limit that a figure reached, such as decode_share."""
    return figure.replace("tokens_per_s", "share")
