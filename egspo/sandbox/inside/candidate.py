"""The program's side: runs it, and does with its objects what the tests ask.

Nothing here is trusted. The program may replace any of it; all that it can do with that is to give
other answers, which it could have computed to begin with.
"""

from __future__ import annotations

import importlib
import operator
import os
import signal
import socket
import sys
import types

from .peer import Peer
from .wire import Channel, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MAX_TEXT = 500


def run(code: str, control: socket.socket) -> None:
    """Load the program, say so, then answer each connection that ``control`` brings.

    Each is served by a process of its own, forked from the loaded program: what one test changes,
    breaks or leaves hanging is gone before the next.
    """
    program = _load(code)
    control.sendall(b"L")
    serving = 0
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if serving:
            os.kill(serving, signal.SIGKILL)
            os.waitpid(serving, 0)
        if not descriptors:
            return
        serving = os.fork()
        if serving == 0:
            control.close()
            connection = socket.socket(fileno=descriptors[0])
            _serve(program, Channel(connection))
            os._exit(0)
        os.close(descriptors[0])


def _load(code: str) -> types.ModuleType | BaseException:
    """The program as the module ``solution``, or what it raised."""
    program = types.ModuleType("solution")
    sys.modules["solution"] = program
    sys.modules["__main__"] = program  # pickle and multiprocessing look there
    try:
        exec(compile(code, "solution.py", "exec", dont_inherit=True), program.__dict__)
    except BaseException as error:
        return error
    return program


def _serve(program: types.ModuleType | BaseException, channel: Channel) -> None:
    servant = Servant(program, channel)
    try:
        while True:
            servant.reply(channel.receive())
    except (ProtocolError, OSError):  # the tests are through
        return


class Borrowed:
    """An object of the tests: functions can be called, of others public attributes be used."""

    def __init__(self, servant: Servant, number: int) -> None:
        self.__dict__["_servant"], self.__dict__["_number"] = servant, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        servant = self._servant
        message = ["call", self._number, *servant.encode_arguments(args, kwargs)]
        return servant.answer_to(message)

    def __getattr__(self, name: str) -> Any:
        return self._servant.answer_to(["get", self._number, name])

    def __setattr__(self, name: str, value: Any) -> None:
        self._servant.answer_to(["set", self._number, name, self._servant.encode(value)])


class Servant(Peer):
    """Answers what the tests ask about the objects of the program. Object 0 is its module."""

    def __init__(self, program: types.ModuleType | BaseException, channel: Channel) -> None:
        super().__init__(channel)
        self._program = program
        self.own_number(program)

    def perform(self, request: list[Any]) -> list[Any]:
        try:
            operation, *parts = request
            if isinstance(self._program, BaseException):
                reason = f"{type(self._program).__name__}: {self._program}"[:_MAX_TEXT]
                raise ImportError(f"the program failed to load: {reason}")
            return self._perform(operation, parts)
        except BaseException as error:
            return self.failure(error)

    def _perform(self, operation: str, parts: list[Any]) -> list[Any]:
        if operation == "get":
            return ["return", self.encode(getattr(self.own_object(parts[0]), parts[1]))]
        if operation == "set":
            setattr(self.own_object(parts[0]), parts[1], self.decode(parts[2]))
            return ["return", None]
        if operation == "del":
            delattr(self.own_object(parts[0]), parts[1])
            return ["return", None]
        if operation == "names":
            return ["return", self.encode(_public_names(self._program))]
        sent = parts[1:]
        args = [self.decode(wire) for wire in sent[0]]
        kwargs = {name: self.decode(wire) for name, wire in sent[1]}
        function = self.own_object(parts[0]) if operation == "call" else OPERATIONS[parts[0]]
        result = self.encode(function(*args, **kwargs))
        after = self.encode_arguments(args, kwargs)  # it may have changed its arguments in place
        return ["return", result] if after == sent else ["return", result, *after]

    def encode_arguments(self, args: Any, kwargs: dict[str, Any]) -> list[Any]:
        return [
            [self.encode(value) for value in args],
            [[name, self.encode(value)] for name, value in kwargs.items()],
        ]

    def answer_to(self, message: list[Any]) -> Any:
        kind, *parts = self.ask(message)
        if kind == "raise":
            raise getattr(sys.modules["builtins"], parts[0])(parts[1])
        return self.decode(parts[0])

    def failure(self, error: BaseException) -> list[Any]:
        """``["raise", class, number, arguments, text]``."""
        try:
            args, text = [self.encode(value) for value in error.args], str(error)
        except Exception:
            args, text = [], ""
        return ["raise", _ancestry(self, type(error)), self.own_number(error), args, text]

    def encode_reference(self, value: Any) -> list[Any]:
        if isinstance(value, Borrowed):
            return ["yours", value._number]
        number = self.own_number(value)
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["exception", _ancestry(self, value)]
        fields = getattr(type(value), "_fields", None)
        if isinstance(value, tuple) and isinstance(fields, tuple):
            return ["named", number, type(value).__name__, fields, *map(self.encode, value)]
        return ["own", number]

    def decode_reference(self, kind: str, parts: list[Any]) -> Any:
        if kind == "yours":
            return self.own_object(parts[0])
        if kind == "own":
            return Borrowed(self, parts[0])
        if kind == "iterator":
            return iter([self.decode(part) for part in parts])
        if kind == "global":
            return operator.attrgetter(parts[1])(importlib.import_module(parts[0]))
        raise ProtocolError(f"unknown kind {kind!r}")


def _ancestry(servant: Servant, kind: type[BaseException]) -> list[Any]:
    """Numbers and names of the program's own classes, then those of the standard library."""
    own: list[Any] = []
    standard: list[Any] = []
    for ancestor in kind.__mro__:
        module = ancestor.__module__
        if module == "builtins" or module.partition(".")[0] in sys.stdlib_module_names:
            standard.append([module, ancestor.__qualname__])
        elif issubclass(ancestor, BaseException) and not standard:
            own.append([servant.own_number(ancestor), ancestor.__name__])
    return [own, standard]


def _public_names(program: object) -> list[str]:
    names = getattr(program, "__all__", None)
    if names is None:
        names = [name for name in vars(program) if not name.startswith("_")]
    return [str(name) for name in names]


OPERATIONS: dict[str, Any] = {
    **{f.__name__: f for f in (len, iter, next, bool, str, repr, hash, abs, int, float, complex)},
    **{f.__name__: f for f in (round, format, reversed, isinstance, issubclass, dir)},
    **{
        name: getattr(operator, name)
        for name in (
            *("getitem", "setitem", "delitem", "eq", "ne", "lt", "le", "gt", "ge", "add", "sub"),
            *("mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor"),
            *("lshift", "rshift", "neg", "pos", "invert", "index"),
        )
    },
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": lambda manager, *error: type(manager).__exit__(manager, *error),
}
