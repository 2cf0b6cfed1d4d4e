"""lococo: read text of any length with any Hugging Face decoder, in a fixed number of key/value slots.

Shape letters, here and in every docstring: b batch, h key/value heads, g query heads per key/value head, q queries,
s entries, m slots, w observed queries, d head_dim, v vocabulary, n tokens of a text.

Example:
    >>> import lococo
    >>> model, tokenizer = lococo.load_model()
    >>> with lococo.attach(model, "mass-merge", num_slots=256, positions="packed") as slots:
    ...     inputs = tokenizer(long_text, return_tensors="pt")
    ...     output = model.generate(**inputs, past_key_values=slots.new_cache(), max_new_tokens=64)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lococo.attachment import Attachment, attach
    from lococo.budgets import slots_for
    from lococo.cache import SlotCache
    from lococo.compressors import COMPRESSORS
    from lococo.compressors.base import Compressor, Selection, SelectMerge
    from lococo.compressors.heads import save_heads
    from lococo.entries import Entries
    from lococo.errors import LococoError
    from lococo.models import load_model
    from lococo.reader import prefill, read, score, stream
    from lococo.storage import Context, describe_context, load_context, save_context

__version__ = "0.1.0"

# Where the public names live. They are imported when first used: the command line answers --help without torch.
_HOMES = {
    "COMPRESSORS": "compressors",
    "Attachment": "attachment",
    "Compressor": "compressors.base",
    "Context": "storage",
    "Entries": "entries",
    "LococoError": "errors",
    "SelectMerge": "compressors.base",
    "Selection": "compressors.base",
    "SlotCache": "cache",
    "attach": "attachment",
    "describe_context": "storage",
    "load_context": "storage",
    "load_model": "models",
    "prefill": "reader",
    "read": "reader",
    "save_context": "storage",
    "save_heads": "compressors.heads",
    "score": "reader",
    "slots_for": "budgets",
    "stream": "reader",
}

__all__ = [
    "COMPRESSORS",
    "Attachment",
    "Compressor",
    "Context",
    "Entries",
    "LococoError",
    "SelectMerge",
    "Selection",
    "SlotCache",
    "attach",
    "describe_context",
    "load_context",
    "load_model",
    "prefill",
    "read",
    "save_context",
    "save_heads",
    "score",
    "slots_for",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lococo' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"lococo.{_HOMES[name]}"), name)
    return value
