"""The one switch between fast paths and their naive twins.

Whatever is computed faster than it reads has a plain twin beside it: attention without copies or by products of
matrices (a call of the model's own function), maps in half precision and Triton's kernels (float32 maps), layers side
by side (one after the other) and compiled steps (call by call). `LOCOCO_NAIVE=1` takes the twins everywhere, so that
any command tells whether a figure hangs on a fast path.
"""

import os

SWITCH = "LOCOCO_NAIVE"


def fast() -> bool:
    """Tell whether fast paths may be taken; read anew with every call."""
    return os.environ.get(SWITCH, "0") in ("", "0")
