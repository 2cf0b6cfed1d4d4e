"""Independent pieces of work, one to each of the processor's cores.

Compressing a layer is some hundred small operations, for which two threads inside each gain little; two layers at a
time, of one thread each, take half the time (docs/log.md).
"""

import os
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Barrier

import torch

from lococo.fast import fast


def each(pieces: Sequence[Callable[[], None]], devices: Set[torch.device]) -> None:
    """Do all pieces, in any order and several at a time; one after the other where gradients or autocast are on.

    Args:
        pieces: What is to be done; none may need another.
        devices: Where they compute: only a CPU has cores that wait.

    Raises:
        Exception: The first that a piece raised, once all are done.
    """
    threads = torch.get_num_threads()
    on_cpu = all(device.type == "cpu" for device in devices)
    alone = threads == 1 or len(pieces) == 1 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    if alone or not on_cpu or not fast():
        for piece in pieces:
            piece()
        return
    inference = torch.is_inference_mode_enabled()

    def run(piece: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # modes are those of a thread
            piece()

    pool = _pool(threads, os.getpid())
    done = [pool.submit(run, piece) for piece in pieces]
    try:
        wait(done)
    finally:  # a caller that is interrupted must not find a piece at work
        for future in done:
            future.cancel()
        wait(done)
    for future in done:
        future.result()


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Start threads that compute with one thread each; a forked process has none of its parent's."""
    together = Barrier(threads)

    def start(_: int) -> None:
        torch.get_num_threads()  # otherwise the first operation would ask for the process's number again
        torch.set_num_threads(1)
        together.wait()  # so that each gets one

    pool = ThreadPoolExecutor(threads, "lococo")
    list(pool.map(start, range(threads)))
    torch.set_num_threads(threads)  # what they set for themselves held for threads to come as well
    return pool
