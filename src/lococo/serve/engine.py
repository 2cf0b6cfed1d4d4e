"""The one thread that owns the model: it reads prompts chunk by chunk and writes all answers in one batch, by turns."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from lococo.cache import SlotCache, fork, kv_nbytes
from lococo.errors import LococoError
from lococo.reader import end_tokens
from lococo.serve.answering import Answer
from lococo.serve.batch import Batch
from lococo.serve.conversations import Conversations, Turn
from lococo.serve.failures import ApiError, draining, internal
from lococo.serve.jobs import Failed, Finished, Held, Job, Usage
from lococo.serve.reading import Counts, Reading
from lococo.serve.waiting import Waiting
from lococo.serve.wording import Wording
from lococo.session import Session

log = logging.getLogger("lococo.serve")

# The engine looks for requests that were given up at least this often.
IDLE_SECONDS = 0.5


class Engine:
    """Takes requests from any thread; everything else happens in its own.

    Args:
        session: The attached model.
        max_batch: Requests that are read or answered at a time.
        max_queue: Requests that may wait beside them.
        conversation_nbytes: Memory for conversations that may go on.
    """

    def __init__(self, session: Session, *, max_batch: int, max_queue: int, conversation_nbytes: int) -> None:
        self.session = session
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.wording = Wording.of(session)  # of this thread alone
        self.ends = end_tokens(session.model)
        self.conversations = Conversations(conversation_nbytes)
        self.counts = Counts()
        self.batch = Batch(session.model, self._left, lambda answer, error: self._fail(answer.job, error))
        self.readings: deque[Reading] = deque()
        self._waiting = Waiting()
        self._changed = threading.Condition()
        self._draining = self._closed = self._dirty = False
        self._on_idle: list[Callable[[], None]] = []
        self._seconds = 1.0  # a request takes, on average
        self._thread = threading.Thread(target=self._run, name="lococo-engine", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand in a request.

        Raises:
            ApiError: 429 if too many wait already, 503 while the server is shutting down.
        """
        with self._changed:
            if self._draining or self._closed:
                raise draining()
            # Those that the engine is about to take do not wait. A tenant without any cannot be shut out by others.
            full = len(self._waiting) >= self.max_queue + max(0, self.max_batch - self._active())
            if full and job.tenant in self._waiting:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests wait already; try again later",
                    code="queue_full",
                    retry_after=self._retry_after(),
                )
            job.feed.on_more = self._wake
            self._waiting.put(job)
            self._notify()

    def cancel(self, job: Job) -> None:
        """Give a request up; nothing is told about it any more."""
        job.cancelled.set()
        job.feed.close()
        self._wake()

    def drain(self, on_idle: Callable[[], None]) -> None:
        """Refuse new requests, and call back once the last accepted one is finished."""
        with self._changed:
            self._draining = True
            self._on_idle.append(on_idle)
            self._notify()

    def close(self) -> None:
        """Stop; requests that are not finished fail."""
        with self._changed:
            self._closed = True
            self._notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def is_alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    @property
    def queue_length(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def _wake(self) -> None:
        with self._changed:
            self._notify()

    def _notify(self) -> None:
        self._dirty = True
        self._changed.notify_all()

    def _retry_after(self) -> int:
        return max(1, math.ceil(self._seconds * len(self._waiting) / self.max_batch))

    def _active(self) -> int:
        return len(self.readings) + len(self.batch.answers)

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while not self._closed:
                    self._turn()
        except Exception as error:
            log.critical("the engine has stopped", exc_info=error)
        finally:
            self._give_all_up()

    def _turn(self) -> None:
        """Read a chunk of one prompt, and write a token of every answer."""
        self._admit()
        self._drop_given_up()
        busy = self._read_one()
        if self.batch.answers:
            self._step()
        elif not busy:
            self._rest()

    def _give_all_up(self) -> None:
        with self._changed:
            self._closed = True
        for job in self._jobs():
            job.feed.close()
            job.tell(Failed(draining()))

    def _jobs(self) -> list[Job]:
        """Return all requests, waiting or at work."""
        with self._changed:
            waiting = self._waiting.jobs()
        return [*waiting, *(one.job for one in self.readings), *(answer.job for answer in self.batch.answers)]

    def _rest(self) -> None:
        """Wait until something changes."""
        if self._draining and not self._active() and not self._waiting:
            while self._on_idle:
                self._on_idle.pop()()
        with self._changed:
            if not self._dirty:
                self._changed.wait(IDLE_SECONDS)
            self._dirty = False

    def _admit(self) -> None:
        while self._active() < self.max_batch:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.take()
            try:
                self.readings.append(self._begun(job))
            except Exception as error:
                self._fail(job, error)

    def _begun(self, job: Job) -> Reading:
        """Find what a request can go on from."""
        found = None if job.layout is None else self.conversations.find(job.layout.keys())
        if found is not None:
            end, turn = found
            job.feed.take(end)
            return Reading(job, _forked(turn.cache), list(turn.unread))
        if job.base is not None:
            return Reading(job, _forked(job.base))
        cache = self.session.slots.new_cache()
        assert isinstance(cache, SlotCache)  # the verb refuses "full"
        return Reading(job, cache)

    def _drop_given_up(self) -> None:
        now = time.monotonic()
        gone = {job for job in self._jobs() if job.cancelled.is_set() or now > job.deadline}
        if not gone:
            return
        with self._changed:
            self._waiting.drop(gone)
        self.readings = deque(one for one in self.readings if one.job not in gone)
        for answer in [answer for answer in self.batch.answers if answer.job in gone]:
            self.batch.drop(answer)
        for job in gone:
            job.feed.close()
            if not job.cancelled.is_set():
                job.tell(Failed(ApiError(504, "the request took longer than the server allows", code="timeout")))

    def _read_one(self) -> bool:
        """Read one chunk of the next prompt that has one; tell whether there was any."""
        for _ in range(len(self.readings)):
            reading = self.readings.popleft()
            if not reading.ready():
                self.readings.append(reading)
                continue
            try:
                logits = reading.read_chunk(self.session.model, self.counts)
                if logits is None:
                    self.readings.append(reading)
                else:
                    self._finish_reading(reading, logits)
            except Exception as error:
                self._fail(reading.job, error)
            return True
        return False

    def _finish_reading(self, reading: Reading, logits: torch.Tensor) -> None:
        job = reading.job
        self.counts.cached_tokens += reading.cached
        if job.sampling is None:
            self._done(job)
            job.tell(Held(reading.cache, reading.ids))
            return
        prompt = reading.cache.seen
        answer = Answer(job, job.sampling, self.wording.tokenizer, self.ends, reading.cached, prompt)
        reason = answer.take(logits)
        if reason:
            self._left(answer, reason, reading.cache)
        else:
            self.batch.join(answer, reading.cache)

    def _step(self) -> None:
        self.counts.steps += 1
        self.counts.largest_batch = max(self.counts.largest_batch, len(self.batch.answers))
        self.batch.step()
        self.counts.compressions += self.batch.compressions
        self.batch.compressions = 0

    def _left(self, answer: Answer, reason: str, cache: SlotCache) -> None:
        """Tell that an answer is finished, and keep its slots for the next turn."""
        job = answer.job
        self.counts.completion_tokens += len(answer.tokens)
        # What comes after a stop string is in the slots, but not in the answer.
        if job.layout is not None and not answer.stop.stopped:
            said = self.wording.plain("".join(answer.said))
            self.conversations.keep(job.layout.followed_by(said), Turn(cache, answer.unread))
        self._done(job)
        figures = self.session.figures(cache, cache.seen)
        usage = Usage(
            prompt_tokens=answer.prompt,
            completion_tokens=len(answer.tokens),
            cached_tokens=answer.cached,
            seen=cache.seen,
            slots=round(cache.num_slots),
            kv_nbytes=kv_nbytes(cache),
            full_kv_nbytes=figures["full_kv_nbytes"],
        )
        job.tell(Finished(reason, usage))

    def _done(self, job: Job) -> None:
        self._seconds += 0.1 * (time.monotonic() - job.begun - self._seconds)

    def _fail(self, job: Job, error: Exception) -> None:
        job.feed.close()
        if isinstance(error, ApiError):
            job.tell(Failed(error))
        elif isinstance(error, LococoError):
            job.tell(Failed(ApiError(400, str(error), code="unreadable")))
        else:
            log.error("a request failed", exc_info=error)
            job.tell(Failed(internal()))


def _forked(cache: SlotCache) -> SlotCache:
    made = fork(cache)
    assert isinstance(made, SlotCache)
    return made
