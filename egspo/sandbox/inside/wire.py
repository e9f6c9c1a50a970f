"""JSON messages over a socket, each with its length before it."""

from __future__ import annotations

import json
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing costs as much as starting the interpreter
    from typing import Any

MAX_MESSAGE = 8 * 2**20
"""Bytes: what a function may return at most, encoded."""


class ProtocolError(Exception):
    """The other side sent what is no message, or went away."""


class Channel:
    """One end of a conversation."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, message: Any) -> None:
        """Raises: ValueError: the message is too long. OSError: the other side is gone."""
        data = json.dumps(message, separators=(",", ":")).encode("ascii")
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a value of {len(data)} bytes is too large, {MAX_MESSAGE} at most")
        self._socket.sendall(len(data).to_bytes(4, "big") + data)

    def receive(self) -> Any:
        """Raises: ProtocolError: what came is no message, or nothing will come any more."""
        size = int.from_bytes(self._exactly(4), "big")
        if size > MAX_MESSAGE:
            raise ProtocolError(f"a message of {size} bytes, {MAX_MESSAGE} at most")
        data = self._exactly(size)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"no message: {error}") from None

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._socket.recv(min(size - len(data), 2**20))
            except ConnectionError:
                part = b""
            if not part:
                raise ProtocolError("the program's process ended")
            data += part
        return bytes(data)

    def close(self) -> None:
        self._socket.close()
