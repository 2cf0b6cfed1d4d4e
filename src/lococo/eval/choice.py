"""What a recipe says about a task: which one, how many examples and questions, how long."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lococo.errors import ArgumentError

TooLong = Literal["refuse", "truncate", "middle"]


@dataclass(frozen=True)
class TaskChoice:
    """One task of a suite.

    Attributes:
        name: Of the task.
        shots: Examples with their answers before every question: the first rows, which are not asked.
        limit: Most questions, the first ones; a suite may say less.
        per_document: Most questions about one text; None: all.
        length: Most tokens of a prompt and its answer; None: the model's window, or 1,024 for prompts that are made.
        too_long: What happens to a longer prompt: refuse skips the task and says so, truncate cuts its beginning off,
            middle its middle (LongBench); None: middle for long documents, refuse for all else.
    """

    name: str
    shots: int = 0
    limit: int | None = None
    per_document: int | None = None
    length: int | None = None
    too_long: TooLong | None = None

    @classmethod
    def of(cls, described: object) -> "TaskChoice":
        """Check what a recipe says about a task: its name alone, or a mapping with these attributes."""
        fields = {"name": described} if isinstance(described, str) else described
        if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str):
            raise ArgumentError(f"expected a task as a name or a mapping with a name, got {described!r}")
        if unknown := fields.keys() - cls.__dataclass_fields__.keys():
            expected = ", ".join(cls.__dataclass_fields__)
            raise ArgumentError(f"task {fields['name']}: no setting {', '.join(sorted(unknown))}; expected {expected}")
        for name, least in (("shots", 0), ("limit", 1), ("per_document", 1), ("length", 1)):
            value = fields.get(name, least)
            if value is None and name != "shots":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ArgumentError(f"task {fields['name']}: {name} must be at least {least}, got {value!r}")
        if fields.get("too_long") not in (None, *get_args(TooLong)):
            expected = ", ".join(get_args(TooLong))
            raise ArgumentError(
                f"task {fields['name']}: too_long must be one of {expected}, got {fields['too_long']!r}"
            )
        return cls(**fields)
