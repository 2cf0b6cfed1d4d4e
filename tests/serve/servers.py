"""A server on a loopback port in this process, and what tests read of it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lococo.serve.keys import Keys
from lococo.serve.options import ServerOptions
from lococo.serve.server import Server, bound, url_of
from lococo.serve.state import State, started
from lococo.session import Session


@dataclass
class Running:
    """A server that answers."""

    server: Server
    state: State
    url: str

    @property
    def session(self) -> Session:
        return self.state.session

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def until(self, true: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.005)


@contextlib.contextmanager
def running(session: Session, folder: Path, **options: Any) -> Iterator[Running]:
    settings = ServerOptions(port=0, contexts=str(folder), **options)
    keys = None if settings.api_keys is None else Keys.read(Path(settings.api_keys))
    with bound(settings) as line, started(session, settings, keys) as state:
        server = Server(state, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield Running(server, state, url_of(line))
        finally:
            server.should_exit = True
            thread.join()


def events_of(text: str) -> list[Any]:
    """Read server-sent events; the last must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
