"""Slots of conversations, kept ready for their next turn."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from lococo.cache import SlotCache


@dataclass(frozen=True)
class Turn:
    """A conversation up to the end of an answer.

    Attributes:
        cache: Left as it is; who goes on from it forks it.
        unread: The answer's last token, where the cache has not read it.
    """

    cache: SlotCache
    unread: list[int]


class Conversations:
    """Turns by the hash of their tokens; the ones unused for longest make room. For one thread alone.

    Args:
        budget: Bytes they may take.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._turns: OrderedDict[str, Turn] = OrderedDict()

    def __len__(self) -> int:
        return len(self._turns)

    def find(self, keys: Sequence[tuple[int, str]]) -> tuple[int, Turn] | None:
        """Return the first of these that is kept, and the length of the prompt that it stands for."""
        for end, key in keys:
            if (turn := self._turns.get(key)) is not None:
                self._turns.move_to_end(key)
                return end, turn
        return None

    def keep(self, key: str, turn: Turn) -> None:
        """Keep a turn, in place of an older one of the same tokens."""
        if (older := self._turns.pop(key, None)) is not None:
            self.nbytes -= older.cache.nbytes
        self._turns[key] = turn
        self.nbytes += turn.cache.nbytes
        while self.nbytes > self.budget and self._turns:
            _, oldest = self._turns.popitem(last=False)
            self.nbytes -= oldest.cache.nbytes
