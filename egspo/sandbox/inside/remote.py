"""The tests' side: objects that stand for those of the program.

This side decides, so nothing that arrives may do more than be a value. Rules that a forged answer
would otherwise get around:

* A :class:`Remote` never equals a plain value, and neither comparison, arithmetic nor ``in`` with a
  plain value asks the program: it would learn the expected result, or claim to be equal to it.
* An exception of the program is one of the standard library, or a local class derived from one;
  ``StopIteration``, which would end a loop of the tests early, comes from ``next`` alone.
* A program that died or sent what cannot be decoded has failed the test, even where the test
  expects an exception.
"""

from __future__ import annotations

import builtins
import collections
import functools
import sys
import types

from .peer import Peer
from .values import restore
from .wire import Channel, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

TESTS_MODULE = "tests"
_MAX_ITEMS = 100_000
_CALLABLES = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    functools.partial,
    type,
)


class Broken(BaseException):
    """The program's process is gone or sends nonsense; no ``except Exception`` may catch it."""


class Session(Peer):
    """The tests' view of one process that has loaded the program."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self.broken: str | None = None
        self._remotes: dict[int, Remote] = {}
        self._exceptions: dict[int, type[BaseException]] = {}

    def request(
        self,
        operation: str,
        *head: Any,
        args: Sequence[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Ask the program: ``get``, ``set``, ``del``, ``names``; with ``args`` ``call``, ``op``.

        Raises:
            BaseException: what the program raised.
            Broken: there is no program any more.
            TypeError: an argument is nothing that the program can be given.
        """
        message = [operation, *head]
        if args is not None:
            named = (kwargs or {}).items()
            message += [[self.encode(arg) for arg in args]]
            message += [[[name, self.encode(value)] for name, value in named]]
        if self.broken:
            raise Broken(self.broken)
        try:
            kind, *parts = self.ask(message)
            error = self._error(operation, head, parts) if kind == "raise" else None
            result = self.decode(parts[0]) if error is None else None
            if error is None and len(parts) > 1:
                restore(list(args or ()), [self.decode(part) for part in parts[1]])
                restore(kwargs or {}, {name: self.decode(part) for name, part in parts[2]})
        except Exception as problem:
            # Whatever was wrong with the answer, it is the program's, not the test's.
            self.broken = f"{type(problem).__name__}: {problem}"
            raise Broken(self.broken) from None
        if error is not None:
            raise error
        return result

    def _error(self, operation: str, head: Sequence[Any], parts: list[Any]) -> BaseException:
        ancestry, number, args, text = parts
        kind = self._exception_class(ancestry)
        if issubclass(kind, StopIteration | StopAsyncIteration) and head != ("next",):
            return RuntimeError(f"the program raised {kind.__name__}")
        if not isinstance(number, int) or not isinstance(text, str):
            raise ProtocolError("a malformed exception")
        try:
            error = kind(*map(self.decode, args))
        except Exception:  # some need arguments of certain types
            error = kind(text)
        if hasattr(kind, "_egspo_class"):
            error.__dict__["_egspo_remote"] = self.remote(number)
            error.__dict__["_egspo_text"] = text
        return error

    def _exception_class(self, ancestry: list[Any]) -> type[BaseException]:
        """A local class for the program's, derived from the same class of the standard library."""
        own, standard = ancestry
        kind = next(k for k in (_standard_exception(*place) for place in standard) if k)
        for number, own_name in reversed(own):
            if number not in self._exceptions:
                members = {
                    "_egspo_class": self.remote(number),
                    "__str__": lambda self: self.__dict__.get("_egspo_text", ""),
                    "__getattr__": _exception_attribute,
                }
                self._exceptions[number] = type(str(own_name), (kind,), members)
            kind = self._exceptions[number]
        return kind

    def remote(self, number: int) -> Remote:
        if not isinstance(number, int):
            raise ProtocolError(f"{number!r} is no number of an object")
        if number not in self._remotes:
            self._remotes[number] = Remote(self, number)
        return self._remotes[number]

    # --- What the program may do with objects of the tests, while it has been called

    def perform(self, request: list[Any]) -> list[Any]:
        try:
            operation, number, *parts = request
            target = self.own_object(number)
            if operation == "call" and isinstance(target, _CALLABLES):
                args = [self.decode(wire) for wire in parts[0]]
                kwargs = {str(name): self.decode(wire) for name, wire in parts[1]}
                return ["return", self.encode(target(*args, **kwargs))]
            if operation in ("get", "set") and isinstance(target, _CALLABLES):
                raise AttributeError("a function of the tests can only be called")
            if operation in ("get", "set") and str(parts[0]).startswith("_"):
                raise AttributeError(f"{parts[0]} of an object of the tests is not public")
            if operation == "get":
                return ["return", self.encode(getattr(target, str(parts[0])))]
            if operation == "set":
                setattr(target, str(parts[0]), self.decode(parts[1]))
                return ["return", None]
            raise ProtocolError(f"unknown operation {operation!r}")
        except Exception as error:
            return self.failure(error)

    def failure(self, error: BaseException) -> list[Any]:
        kind = next(k for k in type(error).__mro__ if k.__module__ == "builtins")
        # What an assertion says is for those who read the tests.
        text = "" if isinstance(error, AssertionError) else str(error)[:500]
        return ["raise", kind.__name__, text]

    # --- References

    def encode_reference(self, value: Any) -> list[Any]:
        remote = value if isinstance(value, Remote) else _remote_of(value)
        if remote is not None:
            return ["yours", _number(remote)]
        where = _importable(value)
        if where is not None:
            return ["global", *where]
        if isinstance(value, collections.abc.Iterator):
            items = [item for item, _ in zip(value, range(_MAX_ITEMS), strict=False)]
            return ["iterator", *map(self.encode, items)]
        if isinstance(value, collections.abc.KeysView | collections.abc.ValuesView):
            return ["list", *map(self.encode, value)]
        if isinstance(value, _CALLABLES) or type(value).__module__ == TESTS_MODULE:
            return ["own", self.own_number(value)]
        raise TypeError(f"a {type(value).__name__} cannot be given to the program")

    def decode_reference(self, kind: str, parts: list[Any]) -> Any:
        if kind == "own":
            return self.remote(parts[0])
        if kind == "yours":
            return self.own_object(parts[0])
        if kind == "exception":
            return self._exception_class(parts[0])
        if kind == "named":
            number, name, fields, *values = parts
            base = collections.namedtuple(str(name), fields)  # type: ignore[misc]
            named = type(base.__name__, (base,), {})(*map(self.decode, values))
            named._egspo_remote = self.remote(number)
            return named
        raise ProtocolError(f"unknown kind {kind!r}")


class Remote:
    """Stands for an object of the program."""

    __slots__ = ("_egspo_number", "_egspo_session")

    def __init__(self, session: Session, number: int) -> None:
        object.__setattr__(self, "_egspo_session", session)
        object.__setattr__(self, "_egspo_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._egspo_session.request("get", self._egspo_number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        session = self._egspo_session
        session.request("set", self._egspo_number, name, session.encode(value))

    def __delattr__(self, name: str) -> None:
        self._egspo_session.request("del", self._egspo_number, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._egspo_session.request("call", self._egspo_number, args=args, kwargs=kwargs)

    def __contains__(self, item: object) -> bool:
        return any(item is other or item == other for other in iter(self))

    def __bool__(self) -> bool:
        return _operate(self, "bool") is True

    def __instancecheck__(self, instance: object) -> bool:
        return _is_remote(instance) and _operate(instance, "isinstance", self) is True

    def __subclasscheck__(self, subclass: type) -> bool:
        return _is_remote(subclass) and _operate(subclass, "issubclass", self) is True

    def __exit__(self, *error: Any) -> bool:
        # The exception itself stays here: it may be an assertion that holds the expected value.
        nothing = None if error[0] is None else RuntimeError
        return _operate(self, "exit", nothing, None, None) is True


def _operate(remote: Any, name: str, *args: Any) -> Any:
    remote = remote if isinstance(remote, Remote) else _remote_of(remote)
    return remote._egspo_session.request("op", name, args=(remote, *args))


def _number(remote: Remote) -> int:
    number: int = object.__getattribute__(remote, "_egspo_number")
    return number


def _remote_of(value: Any) -> Remote | None:
    """The program's object behind a local one: a named tuple, an exception or its class."""
    remote = None
    if isinstance(value, type):
        remote = value.__dict__.get("_egspo_class")
    elif isinstance(value, tuple | BaseException):
        remote = getattr(value, "__dict__", {}).get("_egspo_remote")
    return remote if isinstance(remote, Remote) else None


def _is_remote(value: Any) -> bool:
    return isinstance(value, Remote) or _remote_of(value) is not None


def _exception_attribute(error: BaseException, name: str) -> Any:
    remote = error.__dict__.get("_egspo_remote")
    if remote is None or name.startswith("__"):
        raise AttributeError(name)
    return getattr(remote, name)


def _standard_exception(module: str, name: str) -> type[BaseException] | None:
    """The class of that name, if it is of the standard library and its module in use here."""
    if module != "builtins" and module.partition(".")[0] not in sys.stdlib_module_names:
        return None
    kind = getattr(sys.modules.get(module), name, None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseException) else None


def _importable(value: Any) -> tuple[str, str] | None:
    """Module and name of a function or class that is in the standard library."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    if module != "builtins" and module.partition(".")[0] not in sys.stdlib_module_names:
        return None
    found: Any = builtins if module == "builtins" else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return (module, name) if found is value else None


def _alone(name: str) -> Callable[..., Any]:
    def operate(self: Remote, *args: Any) -> Any:
        return _operate(self, name, *args)

    return operate


def _between(name: str, *, reflected: bool = False) -> Callable[[Remote, object], Any]:
    """An operation between two objects of the program; with anything else it is not defined."""

    def operate(self: Remote, other: object) -> Any:
        if not _is_remote(other):
            return NotImplemented
        return _operate(other, name, self) if reflected else _operate(self, name, other)

    return operate


for _name in (
    *("len", "iter", "next", "str", "repr", "hash", "abs", "int", "float", "complex", "round"),
    *("format", "reversed", "dir", "getitem", "setitem", "delitem", "neg", "pos", "invert"),
    *("index", "enter"),
):
    setattr(Remote, f"__{_name}__", _alone(_name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _between(_name))
for _name in (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor"),
    *("lshift", "rshift"),
):
    setattr(Remote, f"__{_name.rstrip('_')}__", _between(_name))
    setattr(Remote, f"__r{_name.rstrip('_')}__", _between(_name, reflected=True))
