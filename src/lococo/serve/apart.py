"""HTML and PDF are taken apart in a process of their own, which may take so much time and memory and no more.

Their parsers can be kept busy for hours by a small file, and Python cannot stop a thread.
"""

import codecs
import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lococo.documents import read_text
from lococo.errors import DocumentError, LococoError

CPU_SECONDS = 120
MEMORY = 4 << 30
PIECE_BYTES = 1 << 16
LOOK_SECONDS = 0.25  # whether anybody still wants the text
REFUSED = 3  # the exit status of a process that has told why


def read_apart(path: Path, wanted: Callable[[], bool]) -> Iterator[str]:
    """Yield the text of a file, as `read_text` does.

    Args:
        path: Of an HTML or PDF file.
        wanted: Whether anybody waits for it; nothing more comes where nobody does.

    Raises:
        DocumentError: If it cannot be read, or takes too much of the machine.
    """
    command = [sys.executable, "-m", "lococo.serve.apart", str(path), str(CPU_SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while wanted():
                if not select.select([process.stdout], [], [], LOOK_SECONDS)[0]:
                    continue
                if not (piece := os.read(process.stdout.fileno(), PIECE_BYTES)):
                    break
                yield decoder.decode(piece)
            else:
                return
            if process.wait() == REFUSED:
                raise DocumentError(process.stderr.read().decode())
            if process.returncode:
                raise DocumentError(f"{path} takes more time or memory to read than it may; save it as text")
        finally:
            process.kill()


def _main(path: str, seconds: str) -> int:
    """Write the text of a file to standard output, or why there is none to standard error."""
    _limit(int(seconds))
    try:
        for piece in read_text(Path(path)):
            sys.stdout.buffer.write(piece.encode())
            sys.stdout.buffer.flush()
    except LococoError as error:
        sys.stderr.write(str(error))
        return REFUSED
    return 0


def _limit(seconds: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has these
        import resource

        os.nice(5)  # whoever is being answered goes first
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
