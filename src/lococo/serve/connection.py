"""One client's connection: uvicorn's own, but for clients that never come to an end."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 20.0


class Connection(H11Protocol):
    """Closes connections where a request's head, or a body after its refusal, takes longer than `SECONDS`.

    Until then what comes of a refused body is thrown away: a client that is still sending would not see the refusal if
    the connection were closed at once. Bodies before an answer are the gate's business.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        try:
            super().data_received(data)
        except h11.LocalProtocolError:
            # What follows a body is no HTTP, and uvicorn would say so in the middle of an answer.
            self.transport.close()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to wait."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if not self._waits():
            self._stop()
        elif self._patience is None:
            self._patience = self.loop.call_later(SECONDS, self._give_up)

    def _waits(self) -> bool:
        refused = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        return refused or self.conn.their_state is h11.IDLE

    def _stop(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if self._waits() and not self.transport.is_closing():
            self.transport.close()
