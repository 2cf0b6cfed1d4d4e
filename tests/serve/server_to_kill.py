"""A server that is killed and started again: the model is loaded once, and every line of input forks a server of it.

    python server_to_kill.py MODEL CONTEXTS

Answers each line with the process id and the URL of the new server, once it listens.
"""

import os
import sys
import threading
import time
from pathlib import Path

from lococo.options import ModelOptions, SlotOptions
from lococo.serve.options import ServerOptions
from lococo.serve.server import Server, bound, url_of
from lococo.serve.state import started
from lococo.session import Session, opened


def main(model: str, folder: str) -> None:
    with opened(ModelOptions(model=model), SlotOptions("mass-merge", num_slots=32, chunk_size=16)) as session:
        # Nothing has started a thread yet that a fork would lose.
        assert threading.active_count() == 1
        for _ in sys.stdin:
            if not os.fork():
                serve(session, Path(folder))
                os._exit(0)
            os.waitpid(-1, os.WNOHANG)


def serve(session: Session, folder: Path) -> None:
    options = ServerOptions(port=0, contexts=str(folder))
    with bound(options) as line, started(session, options) as state:
        server = Server(state, options)

        def tell() -> None:
            while not server.started:
                time.sleep(0.001)
            print(os.getpid(), url_of(line), flush=True)

        threading.Thread(target=tell).start()
        server.run(sockets=[line])


if __name__ == "__main__":
    main(*sys.argv[1:])
