"""Running the server: uvicorn, signals, and an end that loses no answer."""

import sys
from types import FrameType

import uvicorn

from lococo.serve.app import make_app
from lococo.serve.journal import to_stream
from lococo.serve.options import ServerOptions
from lococo.serve.state import State, started
from lococo.session import Session


class Server(uvicorn.Server):
    """uvicorn's server, which at the first signal only stops to take requests and finishes those it has.

    Args:
        state: The server's parts.
        options: Where to listen.
    """

    def __init__(self, state: State, options: ServerOptions) -> None:
        config = uvicorn.Config(
            make_app(state),
            host=options.host,
            port=options.port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=max(1, int(options.timeout)),
        )
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what was accepted at the first signal, stop at the second."""
        if self._state.engine.is_draining:
            super().handle_exit(sig, frame)
            self.force_exit = True
            return
        self.drain()

    def drain(self) -> None:
        """Refuse new requests, and stop once the last accepted one is answered."""

        def leave() -> None:
            self.should_exit = True

        self._state.engine.drain(leave)


def run(session: Session, options: ServerOptions) -> None:
    """Serve until a signal ends it.

    Args:
        session: The attached model.
        options: Where to listen, whom to answer.
    """
    to_stream(sys.stderr)
    with started(session, options) as state:
        server = Server(state, options)
        server.run()
