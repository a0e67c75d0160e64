"""A connection to a client that may be slow, or gone without a word."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientConnection(H11Protocol):
    """An HTTP/1.1 connection that is dropped when its client keeps the server waiting.

    That is: when a request stays half sent, or when no byte of an answer is taken, for `patience`
    seconds. uvicorn itself only ends connections on which nothing was asked for a while.
    """

    def __init__(self, *args: object, patience: float, **options: object):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._patience = patience
        self._reading: asyncio.TimerHandle | None = None  # until more of a request must be here
        self._writing: asyncio.TimerHandle | None = None  # until more of an answer must be taken

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_half_head = self.conn.their_state is h11.IDLE and self._reading is not None
        if not is_half_head:  # that must be whole in time, however it trickles
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        self._reading = None
        self._writing = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self._patience, self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection, and drop one whose client has not taken the last answer."""
        if self.transport.get_write_buffer_size():
            self._drop()
        else:
            super().timeout_keep_alive_handler()

    def _await_request(self) -> None:
        """Wait for the rest of a request, where one is half here."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        is_idle = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is not None
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not is_idle:
            self._reading = self.loop.call_later(self._patience, self._on_silence)

    def _on_silence(self) -> None:
        self._reading = None
        if self.flow.read_paused:  # it is the server that takes its time
            self._await_request()
        elif self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._drop()

    def _drop(self) -> None:
        self.transport.abort()
