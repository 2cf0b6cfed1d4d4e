"""Answers that are written together: one token of each per step, while some leave and others join."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from lococo.cache import SlotCache, taken
from lococo.reader import prefill
from lococo.serve.answering import Answer


@dataclass
class Group:
    """Rows of one cache and the answers they belong to."""

    cache: SlotCache
    answers: list[Answer]


@dataclass
class Batch:
    """All answers that are being written.

    Models with sliding layers or recurrent states keep transformers' own cache there, whose rows must have come equally
    far. Their answers are groups of one each.

    Attributes:
        model: Attached.
        left: Called for an answer that is finished: its reason, and a cache of its own row.
        failed: Called for an answer whose step raised something.
    """

    model: PreTrainedModel
    left: Callable[[Answer, str, SlotCache], None]
    failed: Callable[[Answer, Exception], None]
    groups: list[Group] = field(default_factory=list)
    compressions: int = 0

    @property
    def answers(self) -> list[Answer]:
        """All of them."""
        return [answer for group in self.groups for answer in group.answers]

    @property
    def caches(self) -> list[SlotCache]:
        """What they are written into."""
        return [group.cache for group in list(self.groups) if group.answers]

    def join(self, answer: Answer, cache: SlotCache) -> None:
        """Let an answer take part from the next step on; the cache is the batch's from now on."""
        if cache.holds_slots_alone and self.groups:
            group = self.groups[0]
            group.cache.append(cache)
            group.answers.append(answer)
        else:
            self.groups.append(Group(cache, [answer]))

    def drop(self, answer: Answer) -> None:
        """Let an answer leave unfinished."""
        for group in self.groups:
            for row in [row for row, one in enumerate(group.answers) if one is answer]:
                self._remove(group, row)
        self.groups = [group for group in self.groups if group.answers]

    def step(self) -> None:
        """Write one token of every answer."""
        for group in list(self.groups):
            try:
                self._step(group)
            except Exception as error:  # whatever it is, it must not end the engine
                for answer in group.answers:
                    self.failed(answer, error)
                group.answers = []
        self.groups = [group for group in self.groups if group.answers]

    def _step(self, group: Group) -> None:
        tokens = torch.tensor([[answer.tokens[-1]] for answer in group.answers])
        self.compressions += group.cache.rows.room.count(0)
        logits = prefill(self.model, tokens, group.cache)
        # From the last row on, since the last one takes the place of one that leaves.
        for row in reversed(range(len(group.answers))):
            self._take(group, row, logits[row : row + 1])

    def _take(self, group: Group, row: int, logits: torch.Tensor) -> None:
        """Write a row's token. It leaves when it is finished, or when that fails, which is no fault of the others."""
        answer = group.answers[row]
        try:
            reason = answer.take(logits)
            if reason is None:
                return
            cache = taken(group.cache, [row])
        except Exception as error:
            self._remove(group, row)
            self.failed(answer, error)
            return
        self._remove(group, row)
        try:
            self.left(answer, reason, cache)
        except Exception as error:
            self.failed(answer, error)

    @staticmethod
    def _remove(group: Group, row: int) -> None:
        if len(group.answers) > 1:
            group.cache.remove(row)
        group.answers[row] = group.answers[-1]
        group.answers.pop()
