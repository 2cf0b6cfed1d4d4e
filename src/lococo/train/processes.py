"""Which of several processes this one is, before torch is imported."""

import os


def first_process() -> bool:
    """Tell whether this process speaks for all that `torchrun` or `accelerate launch` have started."""
    return os.environ.get("RANK", "0") == "0"
