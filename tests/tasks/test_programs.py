"""Which program a completion gives, however it is written down, and programs with preambles."""

from __future__ import annotations

import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egspo.tasks.code import code_format, extract_tested
from egspo.tasks.code_tests import as_test, import_free_names
from egspo.tasks.programs import behind, extract_program, fenced, names_under_test

A, B = "def a(): return 1\n", "def b(): return 2\n"
BODY = "def f(x):\n    if x:\n        return 1\n    return 2\n"


@pytest.mark.parametrize(
    ("completion", "program", "formatted"),
    [
        (f"```python\n{A}```", A, True),
        (f"Think.\n```python\n{A}```\nThen:\n```python\n{B}```\nDone.", B, True),
        (f"```python\n{A}```\n```python\n{B}", A, True),  # the last is cut off
        (f"```python\n{B}", B, False),
        (f"text ```python\n{B}", None, False),  # no line of its own
        (f"```\n{A}```", A, False),
        (f"```\n{A}```\n```python\n{B}```", B, True),
        (f"```python\n{A}```\n```\noutput: 1\n```", A, True),
        (f"```Python3\n{A}```", A, True),
        (f"```py title='x'\n{A}```", A, True),
        (f"   ```python  \r\n{A}   ```  ", A, True),
        (f"```java\n{A}```", None, False),
        (f"```bash\npip install x\n```\n```python\n{A}```", A, True),
        (f"```python\n```python\n{A}```", A, True),
        ("```python\n```", "", False),
        ("```python\n \n```", " \n", False),
        ("```python", "", False),
        (A, None, False),
        ("", None, False),
        ("`python`", None, False),
        (f"````python\n{A}````", A, True),
        (f"````python\n{A}```", f"{A}```", False),  # a fence closes with as many
        (f"~~~python\n{A}~~~", A, True),
        (f"~~~python\n{A}```\n~~~", f"{A}```\n", True),
        (f"```python\n{A}~~~\n```", f"{A}~~~\n", True),
        ("```python\n" + A.strip() + "```", A.strip(), True),  # on the last line of code
        ("```python\n" + A.strip() + "``` \r\nThen:\n```python\n" + B + "```", B, True),
        (f"1. Like this:\n   ```python\n{textwrap.indent(BODY, '   ')}   ```", BODY, True),
        (f"1. Like this:\n\n    ```python\n{textwrap.indent(BODY, '    ')}    ```", BODY, True),
        (f"- ```python\n{textwrap.indent(BODY, '  ')}  ```", BODY, True),
        (f"10. ~~~py\n{textwrap.indent(BODY, '    ')}    ~~~", BODY, True),
        (f"\t```python\n{textwrap.indent(BODY, chr(9))}\t```", BODY, True),
        (f"   ```python\n{BODY}   ```", BODY, True),  # the fence alone is indented
        # In the docstring of a program, a fence further in is a line as any other.
        ('```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```', ..., True),
        ("```python\nprint('数字')  # 印刷\n```", "print('数字')  # 印刷\n", True),
        ("答案是：\n```python\nx = 1\n```", "x = 1\n", True),
        ("```python\n\ud800\0\n```", "\ud800\0\n", True),
    ],
)
def test_programs_in_completions(completion: str, program: object, formatted: bool) -> None:
    if program is ...:
        program = completion.removeprefix("```python\n").removesuffix("```")
    assert extract_program(completion) == program
    assert code_format([completion]) == [float(formatted)]


LINES = ["\n", "```\n", "```python\n", " ", "~~~\n", "1. ```\n"]  # seconds each


@pytest.mark.parametrize(
    "unit",
    [
        *("a", "`", "```", "``` ", "   ```", "```python```", "\0", "数", "~", "a```\n", "- "),
        *("```` ", "a`", "`~", "x = 1\n"),
        *(pytest.param(unit, marks=pytest.mark.slow) for unit in LINES),
    ],
)
def test_huge_completions_take_linear_time(unit: str) -> None:
    completion = unit * (10**6 // len(unit))
    for text in (completion, f"```python\n{completion}\n```"):
        start = time.process_time()
        extract_program(text, {"f", "g"})
        code_format([text])
        assert time.process_time() - start < 3


# --- which block it is

TESTS = "from solution import f\n\ndef test_f():\n    assert f(0) == 2\n"
DEMO = "print(f(0))  # 2\n"


@pytest.mark.parametrize(
    "completion",
    [
        fenced(BODY) + "\nUse it so:\n" + fenced(DEMO),
        fenced(BODY) + "\n" + fenced("from solution import f\nassert f(0) == 2\nx = f(1)"),
        fenced("def f(x): ...") + "\nBetter:\n" + fenced(BODY) + "\n" + fenced(DEMO),
        fenced(DEMO) + "\n" + fenced(BODY),
        fenced(BODY) + "\n" + fenced("class g: pass"),
        f"```\n{BODY}```\n" + fenced(DEMO),
        fenced(DEMO) + f"\n```python\n{BODY}",
        fenced(BODY) + "\n```python\ndef f(x): # cut off",
        fenced(BODY) + "\n```text\ndef f(x): no code\n```",
    ],
)
def test_the_block_that_defines_what_is_tested_wins(completion: str) -> None:
    program = extract_tested(completion, tests=TESTS, prelude="")
    assert program is not None and program.strip() == BODY.strip()


def test_of_several_names_most_count() -> None:
    one, two = fenced("def a(): pass"), fenced("a = None\nclass b: pass")
    assert extract_program(f"{two}\n{one}", {"a", "b"}) == "a = None\nclass b: pass\n"
    assert extract_program(f"{two}\n{one}", {"a"}) == "def a(): pass\n"
    assert extract_program(f"{two}\n{one}", {"c"}) == "def a(): pass\n"
    assert extract_program(f"{two}\n{one}") == "def a(): pass\n"
    # A comparison, and what is inside of something, are no definitions.
    for text in ("f == 1", "class C:\n    def f(self): pass", "print(f)"):
        assert extract_program(f"{fenced(BODY)}\n{fenced(text)}", {"f"}) == BODY


def test_what_tests_call() -> None:
    tests = "import solution\nfrom solution import a, b as c\ndef test():\n    solution.d(e)\n"
    assert names_under_test(tests) == {"a", "b", "d"}
    assert names_under_test("def test(:") == frozenset()


fences = st.sampled_from(["```", "~~~", "````"])
programs = st.lists(
    st.sampled_from(["x = 1", "def f():\n    return 1", "# note", "", "class C:\n    y = 2"]),
    min_size=1,
).map("\n".join)


@given(programs, fences, st.sampled_from(["python", "py", "Python3"]), st.data())
def test_every_way_to_write_a_program_is_read(
    program: str, fence: str, language: str, data: st.DataObject
) -> None:
    marker = data.draw(st.sampled_from(["", "1. ", "- ", "  * ", "12) "]))
    indent = data.draw(st.sampled_from(["", "  ", "   ", "    ", "\t", "        "]))
    if marker:
        indent = " " * len(marker)
    end = data.draw(st.sampled_from(["\n", "\n\n", ""]))
    if not program.strip() or "#" in program.rsplit("\n", 1)[-1] or not program[-1:].strip():
        end = "\n"
    body = textwrap.indent(program, indent)
    closing = f"{indent}{fence}" if end else fence
    text = f"Text.\n\n{marker or indent}{fence}{language}\n{body}{end}{closing}\n\nMore: `x`.\n"
    found = extract_program(text)
    assert found is not None
    assert found.rstrip() == program.rstrip()
    compile(found, "program", "exec")
    assert code_format([text]) == [float(bool(program.strip()))]


# --- preambles


@pytest.mark.parametrize(
    "program",
    [
        "from __future__ import annotations\nx: Undefined = 1\n",
        '"""A module."""\nfrom __future__ import annotations\nx: Undefined = 1\n',
        '# -*- coding: utf-8 -*-\n"""Ä."""\n\nfrom __future__ import (\n    annotations,\n'
        "    division,\n)\nx: Undefined = 1\n",
        "from __future__ import annotations; x: Undefined = 1\n",
        "from __future__ import annotations\r\nfrom __future__ import division\r\nx: No = 1\r\n",
    ],
)
def test_future_imports_behind_a_preamble(program: str) -> None:
    whole = behind("import math\n\n\ndef helper(): return math.pi", program)
    namespace: dict[str, object] = {}
    exec(compile(whole, "program", "exec", dont_inherit=True), namespace)
    assert namespace["x"] == 1 and "helper" in namespace
    with pytest.raises(SyntaxError):
        compile(f"import math\n{program}", "program", "exec", dont_inherit=True)


@pytest.mark.parametrize(
    "program", ["x = '__future__'", "from __future__ import (", "def f():\n    x = 1", "\ud800"]
)
def test_other_programs_stand_behind_it_as_they_are(program: str) -> None:
    assert behind("import math", program) == f"import math\n{program}"


# --- names of the tests


def test_free_names() -> None:
    setup = "import math\nroot = Node(1)\nroot.left = Node(2)\n"
    assert import_free_names(setup) == "from solution import Node"
    assert import_free_names("x = [len(y) for y in f(1)]") == "from solution import f"
    assert import_free_names("assert math.isclose(area(2), math.pi)").split("\n") == [
        *("import math", "from solution import area")
    ]
    test = as_test("test_1", "assert height(root) == 2", defined=setup)
    assert test == ("def test_1():\n    from solution import height\n    assert height(root) == 2")


@pytest.mark.parametrize("name", ["sum", "max", "code", "string", "set"])
def test_names_that_the_reference_defines_are_the_programs(name: str) -> None:
    reference = f"def {name}(a, b):\n    return a + b\n"
    body = f"assert {name}(10, 15) == abs(-25)"
    assert import_free_names(body, reference=reference) == f"from solution import {name}"
    assert as_test("test_1", body, reference=reference).split("\n")[1:] == [
        *(f"    from solution import {name}", f"    {body}")
    ]
    # One that is only used or assigned in it stays what it is.
    for other in (f"print({name})", f"{name} = 1", f"class A:\n    def {name}(self): pass"):
        assert f"from solution import {name}" not in import_free_names(
            "assert f(sum, max, set)", reference=other
        )
