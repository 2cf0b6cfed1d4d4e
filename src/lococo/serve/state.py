"""What the routes share."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from lococo.cached import cache_folder
from lococo.errors import LococoError
from lococo.models import model_id
from lococo.serve.contexts import ContextStore
from lococo.serve.engine import Engine
from lococo.serve.keys import Keys
from lococo.serve.metrics import Metrics
from lococo.serve.options import MIB, ServerOptions
from lococo.serve.wording import Wording
from lococo.session import Session


@dataclass(frozen=True)
class State:
    """A server's parts.

    Attributes:
        session: The attached model.
        options: Limits.
        keys: Who may come in; None: everybody on this machine.
        engine: Reads and answers.
        store: Documents that were read.
        wording: Makes ids of requests.
        metrics: What `/metrics` shows.
        model: Name of the model.
    """

    session: Session
    options: ServerOptions
    keys: Keys | None
    engine: Engine
    store: ContextStore
    wording: Wording
    metrics: Metrics
    model: str


@contextlib.contextmanager
def started(session: Session, options: ServerOptions, keys: Keys | None = None) -> Iterator[State]:
    """Start the engine and open the store; stop and close them at the end.

    Raises:
        LococoError: If the session has the full cache, or the contexts' folder cannot be used.
    """
    if session.slots.compressor is None:
        raise LococoError("compressor 'full' grows with every token and cannot be served; choose another")
    folder = cache_folder() / "contexts" if options.contexts is None else Path(options.contexts).expanduser()
    limits = {"budget": options.contexts_mib * MIB, "memory": options.memory_mib * MIB}
    store = ContextStore(folder, session, shared=options.shared, **limits)
    engine = Engine(
        session,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        conversation_nbytes=options.memory_mib * MIB,
    )
    state = State(
        session=session,
        options=options,
        keys=keys,
        engine=engine,
        store=store,
        wording=Wording.of(session, options.max_prompt_tokens),
        metrics=Metrics(engine, store),
        model=model_id(session.model),
    )
    engine.start()
    try:
        yield state
    finally:
        engine.close()
        store.close()


def state_of(request: Request) -> State:
    """Return the parts of the server that a request came to."""
    state: State = request.app.state.lococo
    return state


def tenant_of(request: Request) -> str:
    """Return who a request is from."""
    return str(request.scope["state"]["tenant"])


def note(request: Request, **facts: object) -> None:
    """Add to what the log says about a request."""
    request.scope["state"].setdefault("facts", {}).update(facts)
