"""As much of pytest as test files of coding data sets use; anything else is an error that says so.

``raises``, ``approx``, ``fail``, ``fixture``, ``mark.parametrize`` (other marks are ignored), test
functions, ``Test`` classes and ``unittest.TestCase``. Importing the real one would take longer than
all else that a run does.
"""

from __future__ import annotations

import itertools
import re
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_ATTRIBUTE = "_egspo_pytest"
_PLAIN_NUMBERS = ("int", "float", "complex", "bool", "Decimal", "Fraction")


class Unsupported(Exception):
    """The tests use a part of pytest that is not here."""


class ExceptionInfo:
    """What ``raises`` gives: ``type``, ``value`` and ``match``."""

    type: type[BaseException]
    value: BaseException

    def match(self, pattern: str) -> bool:
        assert re.search(pattern, str(self.value)), (
            f"{pattern!r} does not match {self.value!s:.200}"
        )
        return True


class _Raises:
    def __init__(self, expected: Any, match: str | None) -> None:
        self._expected, self._match, self._info = expected, match, ExceptionInfo()

    def __enter__(self) -> ExceptionInfo:
        return self._info

    def __exit__(self, kind: Any, value: Any, _: Any) -> bool:
        assert kind is not None, f"did not raise {self._expected}"
        if not issubclass(kind, self._expected):
            return False
        self._info.type, self._info.value = kind, value
        return self._match is None or self._info.match(self._match)


def raises(expected: Any, *args: Any, match: str | None = None, **kwargs: Any) -> Any:
    context = _Raises(expected, match)
    if not args:
        return context
    with context as info:
        args[0](*args[1:], **kwargs)
    return info


class approx:
    """Equal up to ``rel`` (1e-6) of the expected number or ``abs`` (1e-12), the larger one."""

    def __init__(
        self,
        expected: Any,
        rel: float | None = None,
        abs: float | None = None,
        nan_ok: bool = False,
    ) -> None:
        self._expected, self._rel, self._abs, self._nan_ok = expected, rel, abs, nan_ok

    def __eq__(self, actual: object) -> bool:
        return self._close(actual, self._expected)

    def __repr__(self) -> str:
        return f"approx({self._expected!r})"

    __hash__ = None  # type: ignore[assignment]

    def _close(self, actual: Any, expected: Any) -> bool:
        if isinstance(expected, dict):
            return (
                isinstance(actual, dict)
                and actual.keys() == expected.keys()
                and all(self._close(actual[key], expected[key]) for key in expected)
            )
        if isinstance(expected, list | tuple):
            return (
                isinstance(actual, list | tuple)
                and len(actual) == len(expected)
                and all(map(self._close, actual, expected))
            )
        if type(expected).__name__ not in _PLAIN_NUMBERS or isinstance(expected, bool):
            return bool(type(actual) is type(expected) and actual == expected)
        if type(actual).__name__ not in _PLAIN_NUMBERS:
            return False
        if actual == expected:
            return True
        if expected != expected:
            return self._nan_ok and actual != actual
        relative = (1e-6 if self._rel is None else self._rel) * abs(expected)
        absolute = 1e-12 if self._abs is None else self._abs
        tolerance = absolute if self._rel is None and self._abs is not None else None
        tolerance = max(relative, absolute) if tolerance is None else tolerance
        return bool(tolerance != float("inf") and abs(actual - expected) <= tolerance)


def fail(reason: str = "", pytrace: bool = True) -> None:
    raise AssertionError(reason)


def fixture(function: Any = None, **_: Any) -> Any:
    def mark(f: Any) -> Any:
        setattr(f, _ATTRIBUTE + "_fixture", True)
        return f

    return mark if function is None else mark(function)


class _Marks:
    def parametrize(self, names: Any, values: Any, ids: Any = None) -> Callable[[Any], Any]:
        keys = [key.strip() for key in names.split(",")] if isinstance(names, str) else list(names)
        sets = [dict(zip(keys, [v] if len(keys) == 1 else v, strict=True)) for v in values]

        def mark(target: Any) -> Any:
            earlier = target.__dict__.get(_ATTRIBUTE, [])
            setattr(target, _ATTRIBUTE, [*earlier, sets])
            return target

        return mark

    def __getattr__(self, name: str) -> Any:
        if name in ("usefixtures", "filterwarnings"):
            raise Unsupported(f"pytest.mark.{name}")

        def mark(*args: Any, **_: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else lambda target: target

        return mark


def as_module() -> types.ModuleType:
    """What ``import pytest`` gives the tests."""
    module = types.ModuleType("pytest")
    module.__dict__.update(raises=raises, approx=approx, fail=fail, fixture=fixture, mark=_Marks())
    return module


def collect(namespace: dict[str, Any]) -> list[tuple[str, Callable[[], None]]]:
    """The test cases of a module in order: name, and what runs it."""
    cases: list[tuple[str, Callable[[], None]]] = []
    for name, value in list(namespace.items()):
        if isinstance(value, types.FunctionType) and name.startswith("test"):
            cases += _function_cases(name, value, namespace, [])
        elif isinstance(value, type) and hasattr(value, "assertEqual"):
            methods = [method for method in dir(value) if method.startswith("test")]
            cases += [(f"{name}.{method}", value(method).debug) for method in methods]
        elif isinstance(value, type) and name.startswith("Test"):
            shared = value.__dict__.get(_ATTRIBUTE, [])
            for method, function in list(vars(value).items()):
                if method.startswith("test") and isinstance(function, types.FunctionType):
                    inside = _function_cases(f"{name}.{method}", function, namespace, shared, value)
                    cases += inside
    return cases


def _function_cases(
    name: str,
    function: types.FunctionType,
    namespace: dict[str, Any],
    shared: list[list[dict[str, Any]]],
    owner: type | None = None,
) -> Iterator[tuple[str, Callable[[], None]]]:
    sets = [*shared, *function.__dict__.get(_ATTRIBUTE, [])]
    combinations = list(itertools.product(*sets))
    for number, chosen in enumerate(combinations):
        given = {key: value for part in chosen for key, value in part.items()}
        label = name if len(combinations) == 1 else f"{name}[{number}]"
        yield label, _Case(function, given, namespace, owner)


class _Case:
    """One call of a test function, with its fixtures before and after."""

    def __init__(
        self, function: Any, given: dict[str, Any], namespace: dict[str, Any], owner: type | None
    ) -> None:
        self._function, self._given, self._namespace = function, given, namespace
        self._owner = owner
        self._values: dict[str, Any] = {}
        self._open: list[Iterator[Any]] = []

    def __call__(self) -> None:
        instance = None
        if self._owner is not None:
            instance = self._owner()
            self._hook(instance, "setup_class")
            self._hook(instance, "setup_method")
        self._values = {} if instance is None else {"self": instance}
        try:
            self._function(**{key: self._value(key) for key in _parameters(self._function)})
        finally:
            for generator in reversed(self._open):
                next(generator, None)
            if instance is not None:
                self._hook(instance, "teardown_method")

    def _hook(self, instance: Any, name: str) -> None:
        hook = getattr(instance, name, None)
        if hook is not None:
            hook(*([self._function] if "method" in _parameters(hook)[1:] else []))

    def _value(self, name: str) -> Any:
        if name in self._given:
            return self._given[name]
        if name not in self._values:
            self._values[name] = self._make(name)
        return self._values[name]

    def _make(self, name: str) -> Any:
        function: Any = getattr(self._owner, name, None) or self._namespace.get(name)
        if not hasattr(function, _ATTRIBUTE + "_fixture"):
            raise Unsupported(f"the fixture {name!r}")
        made = function(**{key: self._value(key) for key in _parameters(function)})
        if isinstance(made, types.GeneratorType):
            self._open.append(made)
            return next(made)
        return made


def _parameters(function: Any) -> tuple[str, ...]:
    """Names of the parameters without a default."""
    code = function.__code__
    required: int = code.co_argcount - len(function.__defaults__ or ())
    return tuple(code.co_varnames[:required])
