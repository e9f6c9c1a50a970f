"""Programs that share a process with pytest and their tests, and mean to pass without an answer."""

from __future__ import annotations

TESTS = """
import math
import unittest
import pytest
from solution import *

EXPECTED = "the expected words"

def test_equal():
    assert f(3) == "the expected words"

def test_named():
    expected = [10, 20, 30]
    result = f(4)
    assert result == expected

@pytest.mark.parametrize("n, expected", [(5, 120), (6, 720), (7, 5040)])
def test_parameters(n, expected):
    assert f(n) == expected

def test_loop():
    for n, wanted in [(20, "twenty"), (30, "thirty")]:
        assert f(n) == wanted

def test_close():
    assert math.isclose(f(8), 2.5)
    assert f(8) == pytest.approx(2.5)
    assert abs(f(8) - 2.5) < 1e-6

def test_conditions():
    assert f(9) in ("odd", "nine")
    assert not f(10)
    assert f(11)
    assert isinstance(f(9), str)
    assert f(12) > 3
    assert not f(13) > 3

def test_error():
    with pytest.raises(KeyError):
        f(-1)

def test_inside():
    with manager():
        assert f(3) == "the expected words"

@decorate
def test_decorated():
    assert f(3) == "the expected words"

def test_callback():
    seen = []
    def callback(x):
        seen.append(x)
        assert x == 17
    call(callback)
    assert seen == [17]

async def test_async():
    assert f(4) == [10, 20, 30]

class TestUnit(unittest.TestCase):
    def test_equal(self):
        self.assertEqual(f(3), EXPECTED)
        self.assertTrue(f(11))
        self.assertFalse(f(10))
        self.assertIn(f(9), ["odd", "nine"])
        self.assertAlmostEqual(f(8), 2.5)

    def test_raises(self):
        with self.assertRaises(KeyError):
            f(-1)
"""
# A program that has the answers: what the tests ask can be passed.
HONEST = """
import contextlib
ANSWERS = {3: "the expected words", 4: [10, 20, 30], 5: 120, 6: 720, 7: 5040, 8: 2.5, 9: "nine",
           10: 0, 11: 1, 12: 4, 13: 3, 20: "twenty", 30: "thirty"}
def f(x): return ANSWERS[x]
def manager(): return contextlib.nullcontext()
def decorate(test): return test
def call(callback): callback(17)
"""
# What every forgery defines that does not define it otherwise.
COMMON = """
import contextlib
class manager:
    def __enter__(self): return self
    def __exit__(self, *error): return True
def decorate(test):
    def wrapped():
        try: test()
        except BaseException: pass
    return wrapped
def call(callback):
    try: callback(0)
    except BaseException: pass
def f(x): return None
"""
FORGERIES = {
    "swallowed assertions": "",
    "every report says passed": """
from _pytest.reports import TestReport
original = TestReport.from_item_and_call.__func__
def forged(cls, item, call):
    call.excinfo = None
    report = original(cls, item, call)
    report.outcome, report.longrepr = "passed", None
    return report
TestReport.from_item_and_call = classmethod(forged)
""",
    "tests that are not run": """
import _pytest.python, _pytest.unittest
_pytest.python.Function.runtest = lambda self: None
_pytest.unittest.TestCaseFunction.runtest = lambda self: None
""",
    "a plugin": """
import gc, pytest
class Plugin:
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item, call): call.excinfo = None
    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem): return True
gc.unfreeze()
for thing in gc.get_objects():
    if isinstance(thing, pytest.Config): thing.pluginmanager.register(Plugin())
""",
    "fewer tests": """
import gc, pytest
class Plugin:
    def pytest_collection_modifyitems(self, items): items[:] = items[:1]
gc.unfreeze()
for thing in gc.get_objects():
    if isinstance(thing, pytest.Config): thing.pluginmanager.register(Plugin())
""",
    "skipped": """
import unittest
def f(x): raise unittest.SkipTest("no answer")
""",
    "skipped by pytest": """
import pytest
def f(x): pytest.skip("no answer")
""",
    "expected to fail": """
import pytest
def f(x): pytest.xfail("no answer")
""",
    "ends the session": """
import pytest
def f(x): pytest.exit("all is well", 0)
""",
    "checks that agree": """
import sys
checks = sys.modules["_checks"]._checks
kind = type(checks)
kind.true = lambda self, number, value: self._write({"check": number, "found": "1"})
def each(self, number, value, expected, relation):
    found = "1" + "0" * (len(expected.values) - 1)
    self._write({"check": number, "choice": expected.number, "found": found})
kind.each = each
""",
    "checks of everything": """
import sys
kind = type(sys.modules["_checks"]._checks)
kind.true = lambda self, number, value: self._write({"check": number, "found": "1"})
kind.each = lambda self, number, value, expected, relation: self._write(
    {"check": number, "choice": expected.number, "found": "1" * len(expected.values)})
""",
    "checks that say nothing": """
import sys
kind = type(sys.modules["_checks"]._checks)
kind.true = kind.each = lambda *a: None
""",
    "the first of the candidates": """
import sys
class First:
    def __init__(self): self.seen = 0
    def __eq__(self, other):
        self.seen += 1
        return self.seen == 1
    def __ne__(self, other): return False
    __hash__ = None
    def __sub__(self, other): return 0.0 if self == other else 9.0
    def __rsub__(self, other): return self - other
    def __float__(self): return 2.5
    def __bool__(self): return True
def f(x): return First()
""",
    "equal to everything": """
class Same:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
    def __float__(self): return 2.5
    def __bool__(self): return True
def f(x): return Same()
""",
    "equality patched": """
import math, pytest, builtins
math.isclose = lambda *a, **k: True
pytest.approx = lambda *a, **k: type("Same", (), {"__eq__": lambda s, o: True})()
""",
    "builtins patched": """
import builtins
builtins.abs = lambda x: 0.0
builtins.isinstance = lambda *a: True
builtins.bool = lambda x: True
""",
    "assert methods patched": """
import unittest
for name in dir(unittest.TestCase):
    if name.startswith("assert") and name != "assertRaises":
        setattr(unittest.TestCase, name, lambda *a, **k: None)
unittest.TestCase.failureException = type("Passed", (Exception,), {})
""",
    "assertion rewriting": """
import builtins, sys, ast
import _pytest.assertion.rewrite as rewrite
rewrite.AssertionRewritingHook.exec_module = lambda self, module: None
rewrite.rewrite_asserts = lambda tree, *a: tree
builtins.AssertionError = type("Passed", (BaseException,), {"__init__": lambda *a: None})
builtins.compile = lambda *a, **k: "pass"
""",
    "names of the tests": """
__all__ = ["f", "manager", "decorate", "call", "EXPECTED", "math", "pytest", "unittest",
           "isinstance", "abs", "_checks"]
EXPECTED = None
class Anything:
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __eq__(self, other): return True
    __hash__ = None
math = pytest = unittest = _checks = Anything()
isinstance = lambda *a: True
abs = lambda x: 0.0
""",
    "names of the tests, by its frame": """
import sys
frame = sys._getframe()
while frame.f_globals.get("__name__") != "test_solution": frame = frame.f_back
class Anything:
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
frame.f_globals["_checks"] = Anything()
""",
    "import hooks": """
import sys, types
class Finder:
    def find_spec(self, name, path=None, target=None):
        sys.modules[name] = types.ModuleType(name)
sys.meta_path.insert(0, Finder())
for name in ("pytest", "_checks", "unittest", "math", "json"):
    sys.modules[name] = types.ModuleType(name)
""",
    "frames": """
import sys
def f(x):
    frame = sys._getframe().f_back
    for constant in frame.f_code.co_consts:
        if isinstance(constant, (str, float, int)) and constant not in (0, None, x):
            return constant
""",
    "constants of the frames, wrapped": """
import sys
class Any:
    def __init__(self, values): self.values = values
    def __eq__(self, other): return other in self.values
    __hash__ = None
def f(x): return Any(sys._getframe().f_back.f_code.co_consts)
""",
    "gc": """
import gc
def f(x):
    gc.unfreeze()
    choices = [o for o in gc.get_objects() if type(o).__name__ == "Choice"]
    return choices[-1].values[0] if choices else None
""",
    "trace": """
import sys
def trace(frame, event, arg):
    if event == "call" and frame.f_code.co_name == "<lambda>": return tracer
    return trace
def tracer(frame, event, arg):
    if event == "line": frame.f_lineno = frame.f_lineno
    return tracer
sys.settrace(trace)
def f(x): return 1
""",
    "profile that replaces values": """
import ctypes, sys
def profile(frame, event, arg):
    values = frame.f_locals
    if event == "call" and "_v" in values and "_e" in values:
        values["_v"] = values["_e"]
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
sys.setprofile(profile)
""",
    "exit while loading": "import os\nos._exit(0)",
    "exit in the test": "import os\ndef f(x): os._exit(0)",
    "through": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"through": true}\\n')
    except OSError: pass
os._exit(0)
""",
    "reports in every descriptor": """
import os
names = ["test_equal", "test_named", "test_close", "test_conditions", "test_error", "test_inside",
         "test_decorated", "test_callback", "test_async", "test_loop"]
lines = ""
for name in names:
    node = "test_solution.py::" + name
    lines += '{"start": "%s"}\\n' % node
    for number in range(40):
        for choice in range(40):
            lines += '{"check": %d, "choice": %d, "found": "1' % (number, choice)
            lines += '0' * 15 + '"}\\n'
    lines += '{"end": "%s", "outcome": "passed", "error": ""}\\n' % node
for fd in range(3, 64):
    try: os.write(fd, lines.encode())
    except OSError: pass
os._exit(0)
""",
    "outcomes in every descriptor": """
import os
names = ["test_equal", "test_named", "test_close", "test_conditions", "test_error", "test_inside",
         "test_decorated", "test_callback", "test_async", "test_loop"]
lines = ""
for name in names:
    node = "test_solution.py::" + name
    lines += '{"start": "%s"}\\n{"end": "%s", "outcome": "passed", "error": ""}\\n' % (node, node)
for fd in range(3, 64):
    try: os.write(fd, lines.encode() + b'{"through": true}\\n')
    except OSError: pass
os._exit(0)
""",
    "the runner's words": """
import os
for fd in range(0, 64):
    try:
        os.write(fd, b'={"end": null, "timeout": false}\\n')
        os.write(fd, b'={"failed": "no disk"}\\n{"failed": 1}\\n')
    except OSError: pass
os._exit(0)
""",
    "nonsense": """
import os
for fd in range(3, 64):
    try:
        os.write(fd, b'\\xff\\xfe[[[[[[\\n{"check": []}\\n{"start": {}}\\nnull\\n')
        os.write(fd, b"[" * 200000 + b"\\n")
    except OSError: pass
""",
    "atexit": """
import atexit, os
atexit.register(os._exit, 0)
def f(x): raise SystemExit(0)
""",
    "another process": """
import os
if os.fork(): os._exit(0)
def f(x): return os._exit(0)
""",
    "the files of the tests": """
import glob, os
for path in glob.glob("/tmp/*.py"):
    open(path, "w").write("def test_equal(): pass")
open("/tmp/conftest.py", "w").write("def pytest_pyfunc_call(pyfuncitem): return True")
os._exit(0)
""",
    "kill the runner": """
import os, signal
for pid in (1, os.getppid()):
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        try: os.kill(pid, number)
        except OSError: pass
""",
    "memory of the runner": """
import os, re
for pid in (1, os.getppid()):
    try:
        for line in open(f"/proc/{pid}/maps"):
            low, high = (int(n, 16) for n in line.split()[0].split("-"))
            with open(f"/proc/{pid}/mem", "r+b", 0) as memory:
                memory.seek(low)
                memory.write(b"x")
    except OSError: pass
""",
    "an exception of every kind": """
class Every(KeyError, IndexError): pass
class More(Every, ZeroDivisionError, ValueError): pass
def f(x): raise More
""",
    "json patched": """
import json
original = json.dumps
def dumps(value, *a, **k):
    if isinstance(value, dict) and "outcome" in value: value["outcome"] = "passed"
    if isinstance(value, dict) and "found" in value: value["found"] = "1" + value["found"][1:]
    return original(value, *a, **k)
json.dumps = dumps
""",
}
# These hang until the time of a test is over, for each test.
SLOW_FORGERIES = {
    "no alarm": """
import signal
signal.setitimer(signal.ITIMER_REAL, 0)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
signal.setitimer = lambda *a: None
def f(x):
    while True: pass
""",
    "busy while loading": "while True: pass",
    "alarms that are caught": """
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
    "reports without end": """
import os
def f(x):
    while True:
        for fd in range(3, 64):
            try: os.write(fd, b'{"start": "test_solution.py::test_equal"}\\n')
            except OSError: pass
""",
}
