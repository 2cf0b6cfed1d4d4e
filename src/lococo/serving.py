"""The verb that answers over HTTP; see `verbs.py`."""

from pathlib import Path

from lococo.errors import ArgumentError
from lococo.options import ModelOptions, SlotOptions, check_extra
from lococo.serve.options import ServerOptions


def serve(*, server: ServerOptions, model: ModelOptions, slots: SlotOptions) -> None:
    """Answer over HTTP as OpenAI's API does, many requests in one batch, and read documents once for all of them.

    Args:
        server: Where to listen, whom to answer, limits.
        model: Which model reads.
        slots: What texts are read into.
    """
    if slots.compressor == "full":
        raise ArgumentError("compressor 'full' grows with every token and cannot be served; choose another")
    check_extra("serve", "fastapi", "uvicorn", "python_multipart", "prometheus_client")
    from lococo.serve.keys import Keys
    from lococo.serve.server import bound, run
    from lococo.session import opened

    keys = None if server.api_keys is None else Keys.read(Path(server.api_keys).expanduser())
    with bound(server) as line, opened(model, slots) as session:
        run(session, server, keys, line)
