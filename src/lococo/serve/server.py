"""Running the server: uvicorn, signals, and an end that loses no answer."""

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn

from lococo.errors import ArgumentError
from lococo.serve.app import make_app
from lococo.serve.connection import Connection
from lococo.serve.journal import to_stream
from lococo.serve.keys import Keys
from lococo.serve.options import ServerOptions
from lococo.serve.state import State, started
from lococo.session import Session

log = logging.getLogger("lococo.serve")


class Server(uvicorn.Server):
    """uvicorn's server, which at the first signal only stops to take requests and finishes those it has.

    Args:
        state: The server's parts.
        options: Limits.
    """

    def __init__(self, state: State, options: ServerOptions) -> None:
        config = uvicorn.Config(
            make_app(state),
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=max(1, int(options.timeout)),
        )
        super().__init__(config)
        self._state = state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        for one in sockets or ():
            log.info("listening", extra={"facts": {"url": url_of(one), "model": self._state.model}})

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


@contextlib.contextmanager
def bound(options: ServerOptions) -> Iterator[socket.socket]:
    """Take the address, without listening yet, so that one that is taken is noticed before a model is loaded.

    Raises:
        ArgumentError: If it cannot be taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host.strip("[]"), options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        line = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _not_taken(options, error) from error
    with line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            line.bind(address)
        except OSError as error:
            raise _not_taken(options, error) from error
        yield line


def _not_taken(options: ServerOptions, error: OSError) -> ArgumentError:
    return ArgumentError(
        f"{options.host}, port {options.port}, cannot be listened on ({error.strerror or error}); "
        "choose others with --host and --port"
    )


def url_of(line: socket.socket) -> str:
    """Return the address of a bound socket as a URL."""
    host, port = line.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(session: Session, options: ServerOptions, keys: Keys | None, line: socket.socket) -> None:
    """Serve until a signal ends it.

    Args:
        session: The attached model.
        options: Limits.
        keys: Whom to answer; None: everybody on this machine.
        line: Where to listen, from `bound`.
    """
    to_stream(sys.stderr)
    with started(session, options, keys) as state:
        Server(state, options).run(sockets=[line])
