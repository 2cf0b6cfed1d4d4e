"""One prompt or document as it is read, chunk by chunk."""

from array import array
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lococo.cache import SlotCache
from lococo.reader import prefill
from lococo.serve.failures import ApiError, too_long
from lococo.serve.jobs import Job, Progress


@dataclass
class Counts:
    """What an engine has done so far, for metrics."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    compressions: int = 0
    steps: int = 0
    largest_batch: int = 0


@dataclass
class Reading:
    """A prompt or document that is being read.

    Attributes:
        job: Asked for it.
        cache: It is read into.
        before: Ids to read first.
        ids: Read so far; `cached` others were in the cache before.
    """

    job: Job
    cache: SlotCache
    before: list[int] = field(default_factory=list)
    ids: "array[int]" = field(default_factory=lambda: array("i"))

    def __post_init__(self) -> None:
        self.cached = self.cache.seen
        self._logits: Tensor | None = None

    def ready(self) -> bool:
        """Tell whether a chunk can be read now."""
        return bool(self.before) or self.job.feed.ready(self.cache.room())

    def read_chunk(self, model: PreTrainedModel, counts: Counts) -> Tensor | None:
        """Read a chunk; return the logits after the last token of all, (1 v), None where more is to come.

        Raises:
            ApiError: If there is nothing to read, or too much.
        """
        if ids := self._next(self.cache.room()):
            counts.compressions += self.cache.rows.room.count(0)
            self._logits = prefill(model, torch.tensor([ids]), self.cache)
            counts.prompt_tokens += len(ids)
            if self.job.sampling is None:
                self.job.tell(Progress(len(self.ids)))
        return self._logits if self.job.feed.empty and not self.before else None

    def _next(self, room: int) -> list[int]:
        ids, self.before = self.before[:room], self.before[room:]
        ids += self.job.feed.take(room - len(ids))
        if self.job.feed.error is not None:
            raise self.job.feed.error
        if not ids and not self.ids:  # some may have come before it was known that they are the last
            raise ApiError(400, "there is nothing to read; expected a text that is not empty", code="empty_prompt")
        self.ids.extend(ids)
        if len(self.ids) > self.job.max_tokens_read:
            raise too_long(self.job.max_tokens_read)
        return ids
