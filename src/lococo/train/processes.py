"""Which of several processes this one is, before torch is imported."""

import os


def number_of_processes() -> int:
    """Return how many processes `torchrun` or `accelerate launch` have started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Tell whether this process speaks for all that `torchrun` or `accelerate launch` have started."""
    return os.environ.get("RANK", "0") == "0"
