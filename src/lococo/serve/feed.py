"""Token ids on their way from the thread that makes them to the one that reads them."""

import threading
from collections.abc import Callable


class Feed:
    """Lists of ids come in at one end, chunks of the length asked for go out at the other.

    Args:
        ids: The first of them.
        closed: No others will come.
        limit: Ids that may wait; whoever brings more is held up until they are read.
    """

    def __init__(self, ids: list[int] | None = None, *, closed: bool = False, limit: int = 1 << 16) -> None:
        self._waiting = list(ids or [])
        self._start = 0  # those before it are taken
        self._closed = closed
        self._limit = limit
        self._changed = threading.Condition()
        self.error: BaseException | None = None
        self.on_more: Callable[[], None] = lambda: None

    def put(self, ids: list[int]) -> bool:
        """Bring ids; return False where nobody reads any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._count() < self._limit)
            if self._closed:
                return False
            self._waiting += ids
        self.on_more()
        return True

    def close(self, error: BaseException | None = None) -> None:
        """Say that no more will come, or be read."""
        with self._changed:
            self.error = self.error or error
            self._closed = True
            self._changed.notify_all()
        self.on_more()

    def ready(self, length: int) -> bool:
        """Tell whether `take` has something to say."""
        with self._changed:
            return self._closed or self._count() >= length

    @property
    def closed(self) -> bool:
        """Whether no more will come, or be read."""
        return self._closed

    @property
    def empty(self) -> bool:
        """Whether all ids were taken and no others will come."""
        with self._changed:
            return self._closed and not self._count()

    def take(self, length: int) -> list[int]:
        """Return the next ids, at most `length`."""
        with self._changed:
            taken = self._waiting[self._start : self._start + length]
            self._start += len(taken)
            if self._start > self._limit:  # now and then, since it moves all that is left
                del self._waiting[: self._start]
                self._start = 0
            self._changed.notify_all()
        return taken

    def _count(self) -> int:
        return len(self._waiting) - self._start
