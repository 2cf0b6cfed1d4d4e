"""Answers that are written together: one token of each per step, while some leave and others join."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from lococo.cache import SlotCache, joined, taken
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
        """Let an answer take part from the next step on."""
        if cache.holds_slots_alone and self.groups:
            group = self.groups[0]
            group.cache = joined([group.cache, cache])
            group.answers.append(answer)
        else:
            self.groups.append(Group(cache, [answer]))

    def drop(self, answer: Answer) -> None:
        """Let an answer leave unfinished."""
        for group in self.groups:
            self._keep(group, [row for row, one in enumerate(group.answers) if one is not answer])
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
        ended = {}
        for row, answer in enumerate(group.answers):
            if reason := answer.take(logits[row : row + 1]):
                ended[row] = (answer, reason, taken(group.cache, [row]))
        self._keep(group, [row for row in range(len(group.answers)) if row not in ended])
        for answer, reason, cache in ended.values():
            self.left(answer, reason, cache)

    @staticmethod
    def _keep(group: Group, rows: list[int]) -> None:
        if len(rows) == len(group.answers):
            return
        if rows:
            group.cache = taken(group.cache, rows)
        group.answers = [group.answers[row] for row in rows]
