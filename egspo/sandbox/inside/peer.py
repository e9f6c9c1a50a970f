"""What tests and program have in common: each asks the other, and answers while it waits."""

from __future__ import annotations

import threading

from .values import Codec
from .wire import Channel, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Peer(Codec):
    """One side of the conversation, with the objects of its own that the other has seen."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._own: list[object] = []
        self._numbers: dict[int, int] = {}  # by id(); _own keeps the objects, and so their ids
        self._lock = threading.RLock()

    def ask(self, message: list[Any]) -> list[Any]:
        """The reply to ``message``; requests of the other side are served until it comes."""
        with self._lock:
            self._channel.send(message)
            while True:
                incoming = self._channel.receive()
                if not isinstance(incoming, list) or not incoming:
                    raise ProtocolError("neither a request nor a reply")
                if incoming[0] in ("return", "raise"):
                    return incoming
                self.reply(incoming)

    def reply(self, request: list[Any]) -> None:
        """Do what is asked and send the result, or the exception that it raised."""
        try:
            self._channel.send(self.perform(request))
        except ValueError as error:  # too large to be sent, or to be written as JSON
            self._channel.send(self.failure(error))

    def perform(self, request: list[Any]) -> list[Any]:
        raise NotImplementedError

    def failure(self, error: BaseException) -> list[Any]:
        raise NotImplementedError

    def own_number(self, value: object) -> int:
        """The number by which the other side knows ``value``: the same for the same object."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._own)
            self._own.append(value)
        return self._numbers[id(value)]

    def own_object(self, number: Any) -> Any:
        if not isinstance(number, int) or not 0 <= number < len(self._own):
            raise ProtocolError(f"there is no object {number!r}")
        return self._own[number]
