"""Requests that wait for their turn: one of each tenant, then the next of each."""

from collections import OrderedDict, deque

from lococo.serve.jobs import Job


class Waiting:
    """A queue per tenant, served in turns, so that nobody waits behind all that somebody else has asked."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._queues

    def put(self, job: Job) -> None:
        """Add a request behind its tenant's others."""
        self._queues.setdefault(job.tenant, deque()).append(job)

    def take(self) -> Job:
        """Return the next request; its tenant comes last then."""
        tenant, queue = self._queues.popitem(last=False)
        job = queue.popleft()
        if queue:
            self._queues[tenant] = queue
        return job

    def drop(self, gone: set[Job]) -> None:
        """Forget these requests."""
        for tenant, queue in list(self._queues.items()):
            left = deque(job for job in queue if job not in gone)
            if left:
                self._queues[tenant] = left
            else:
                del self._queues[tenant]

    def jobs(self) -> list[Job]:
        """Return all that wait."""
        return [job for queue in self._queues.values() for job in queue]
