"""What decoders call the argument that takes their cache; transformers renamed it in 5.24."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

# Up to 5.23, and from 5.24 on.
CACHE_NAMES = ("past_key_values", "cache")


def cache_name(model: Any) -> str:
    """Return what a model's forward calls its cache; a wrapper that says nothing is asked for what it wraps.

    Args:
        model: A `torch.nn.Module`. Which torch and transformers it comes from does not matter.
    """
    names = (_name_in(type(module).forward) for module in model.modules())
    return next(filter(None, names), CACHE_NAMES[0])


@functools.cache
def _name_in(forward: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)
