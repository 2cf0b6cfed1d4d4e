"""Everything lococo raises on misuse, in one tree.

    LococoError
    ├── ArgumentError      a number or name out of range (also a ValueError)
    ├── ModelError         a model that cannot be loaded
    │   ├── UnsupportedModelError   one that loads but has no key/value cache to compress
    │   └── ConversionError         a checkpoint that cannot be put into another layout
    ├── WindowError        a text longer than the model's window, where it may not be
    ├── DocumentError      a document that is missing, empty, binary or not UTF-8
    ├── FileFormatError    a context, heads or checkpoint file that is damaged or belongs to another model
    └── TrainingError      a training that cannot go on

Every message says what was expected, what came, and what to do about it. The command line prints it as one line and
exits with status 2; nothing else is caught, so that a real bug still shows its traceback.
"""


class LococoError(Exception):
    """Base of everything raised on purpose."""


class ArgumentError(LococoError, ValueError):
    """An argument out of range or unknown."""


class ModelError(LococoError):
    """A model that cannot be loaded."""


class UnsupportedModelError(ModelError):
    """A model without a key/value cache that slots could replace."""


class ConversionError(ModelError):
    """A checkpoint that cannot be put into another layout."""


class WindowError(LococoError):
    """A text longer than the model's window, read with original positions, or a prompt that may not be cut."""


class DocumentError(LococoError):
    """A document that cannot be read as text."""


class FileFormatError(LococoError):
    """A context, heads or checkpoint file that is damaged or belongs to another model."""


class TrainingError(LococoError):
    """A training that cannot go on."""
