"""The simulator itself, on PTX written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.ptx import arithmetic, instructions  # noqa: F401
from tests.kernels.ptx.machine import Machine, MachineProblem
from tests.kernels.ptx.memory import AccessProblem, Memory
from tests.kernels.ptx.program import parse

HEAD = """
.version 8.4
.target sm_90
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u32 kernel_param_1
)
.reqntid {threads}
{{
    .reg .b32 %r<9>;
    .loc 1 2 3 // a comment
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r1, [kernel_param_1];
    mov.u32 %r2, %tid.x;
    mad.wide.u32 %rd2, %r2, 4, %rd1;
"""


def run(
    body: str, values: torch.Tensor, number: int = 0, threads: int = 32, programs: int = 1
) -> torch.Tensor:
    program = parse(HEAD.format(threads=threads) + body + "\nret;\n}\n")
    parameters = dict(zip(program.parameters, (values.data_ptr(), number), strict=True))
    memory = Memory([values])
    Machine(program, memory, parameters, range(programs), (programs, 1, 1), 256).run()
    return values


def test_what_is_parsed() -> None:
    program = parse(
        HEAD.format(threads=64) + "$L_x:\n@!%p1 st.global.v2.b32 [%rd2+8], {%r1, %r2};}"
    )
    assert (program.name, program.threads) == ("kernel", 64)
    assert program.parameters == ("kernel_param_0", "kernel_param_1")
    assert program.labels == {"$L_x": 4}
    store = program.instructions[4]
    assert store.opcode == ("st", "global", "v2", "b32") and store.guard == ("%p1", False)
    assert store.operands == ("[%rd2+8]", ("%r1", "%r2"))


def test_a_loop_whose_length_differs_by_thread_and_program() -> None:
    """Every thread adds the number as often as its index, then the program's index."""
    body = """
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
$L__BB0_1:
    setp.ge.s32 %p1, %r4, %r2;
    @%p1 bra $L__BB0_2;
    add.s32 %r3, %r3, %r1;
    add.s32 %r4, %r4, 1;
    bra.uni $L__BB0_1;
$L__BB0_2:
    mov.u32 %r5, %ctaid.x;
    add.s32 %r3, %r3, %r5;
    mad.wide.u32 %rd3, %r5, 128, %rd2;
    st.global.b32 [%rd3], %r3;
"""
    values = run(body, torch.zeros(3, 32, dtype=torch.int32), 7, programs=3)
    expected = 7 * torch.arange(32)[None, :] + torch.arange(3)[:, None]
    assert torch.equal(values.long(), expected)


def test_accesses_out_of_bounds_and_out_of_line_are_refused() -> None:
    values = torch.zeros(32, dtype=torch.int32)
    run("st.global.b32 [%rd2], %r1;", values, 5)
    assert values.tolist() == [5] * 32
    for access in ("ld.global.b32 %r3, [%rd2+4];", "st.global.b32 [%rd2+-4], %r1;"):
        with pytest.raises(MachineProblem, match="out of bounds, 1 lanes"):
            run(access, values)
    with pytest.raises(MachineProblem, match=r"16 bytes at 0x.* not aligned"):
        run("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd2];", values)
    # What a predicate holds back is not an access.
    run("setp.eq.s32 %p1, %r2, 31;\n@!%p1 ld.global.b32 %r3, [%rd2+4];", values)


def test_threads_that_meet_at_a_barrier_or_an_exchange_must_all_be_there() -> None:
    values = torch.arange(64, dtype=torch.int32)
    apart = "setp.lt.s32 %p1, %r2, 40;\n@%p1 bra $L__BB0_1;\n{}\n$L__BB0_1:\n"
    with pytest.raises(MachineProblem, match="elsewhere"):
        run(apart.format("bar.sync 0;"), values, threads=64)
    swap = "ld.global.b32 %r3, [%rd2];\nshfl.sync.bfly.b32 %r4, %r3, 8, 31, -1;\n"
    with pytest.raises(MachineProblem, match="elsewhere"):
        run(apart.format(swap), values, threads=64)
    run(swap + "st.global.b32 [%rd2], %r4;", values, threads=64)
    assert values.tolist() == [lane ^ 8 for lane in range(64)]


def test_shared_memory_belongs_to_a_program() -> None:
    body = """
    mov.u32 %r5, %ctaid.x;
    mad.wide.u32 %rd2, %r5, 128, %rd2;
    ld.global.b32 %r3, [%rd2];
    shl.b32 %r4, %r2, 2;
    xor.b32 %r6, %r4, 124;
    mov.b32 %r7, global_smem;
    add.s32 %r4, %r7, %r4;
    st.shared.b32 [%r4], %r3;
    bar.sync 0;
    ld.shared.b32 %r3, [%r6];
    st.global.b32 [%rd2], %r3;
"""
    values = torch.arange(64, dtype=torch.int32).view(2, 32)
    assert torch.equal(run(body, values.clone(), programs=2), values.flip(1))


def test_unknown_instructions_and_unwritten_registers_are_errors() -> None:
    values = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(MachineProblem, match="popc"):
        run("popc.b32 %r3, %r1;", values)
    with pytest.raises(MachineProblem, match="%r8 is read before"):
        run("add.s32 %r3, %r8, 1;", values)


@pytest.mark.parametrize(
    ("instruction", "argument", "expected"),
    [
        ("fma.rn.f32 %r3, %r1, %r1, 0fBF800000;", 1 + 2**-12, 2**-11 + 2**-24),  # rounds once
        ("ex2.approx.ftz.f32 %r3, %r1;", -3.0, 0.125),
        ("ex2.approx.ftz.f32 %r3, %r1;", -140.0, 0.0),
        ("max.f32 %r3, %r1, 0f40000000;", float("nan"), 2.0),
        ("neg.f32 %r3, %r1;", 2.5, -2.5),
        ("add.ftz.f32 %r3, %r1, 0f00000000;", 2.0**-130, 0.0),
    ],
)
def test_float_arithmetic(instruction: str, argument: float, expected: float) -> None:
    bits = int(np.float32(argument).view(np.uint32))
    values = run(f"{instruction}\nst.global.b32 [%rd2], %r3;", torch.zeros(32), bits)
    assert values.tolist() == [expected] * 32


@pytest.mark.parametrize(
    ("instruction", "argument", "expected"),
    [
        ("shr.s32 %r3, %r1, 40;", -8, -1),
        ("shr.u32 %r3, %r1, 28;", -8, 15),
        ("shl.b32 %r3, %r1, 32;", 3, 0),
        ("mul.hi.u32 %r3, %r1, -2;", 2**31, 2**31 - 1),
        ("min.s32 %r3, %r1, 4;", -8, -8),
        ("bfe.u32 %r3, %r1, 2, 7;", 0b1011001100, 0b110011),
        ("bfe.u32 %r3, %r1, 0, 32;", 7, 7),
        ("redux.sync.add.s32 %r3, %r1, -1;", 3, 96),
    ],
)
def test_integer_arithmetic(instruction: str, argument: int, expected: int) -> None:
    zeros = torch.zeros(32, dtype=torch.int32)
    values = run(f"{instruction}\nst.global.b32 [%rd2], %r3;", zeros, argument & 2**32 - 1)
    assert values.tolist() == [expected] * 32


def test_halves_round_to_nearest_as_torch_does() -> None:
    numbers = torch.cat([torch.randn(1000), torch.tensor([1.00390625, 1.01171875, 3e38])])
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        with np.errstate(over="ignore"):
            bits = arithmetic.as_bits(numbers.numpy(), kind)
        assert torch.equal(torch.from_numpy(bits.view(np.int16)).view(dtype), numbers.to(dtype))
        back = torch.from_numpy(arithmetic.as_type(bits, kind).astype(np.float32))
        assert torch.equal(back, numbers.to(dtype).float())


def test_approximate_functions_are_off_by_some_units_and_exact_at_powers_of_two() -> None:
    values = np.linspace(0.5, 4, 1000, dtype=np.float32)
    moved = arithmetic.nudge(values, 2)
    off = np.abs(moved.view(np.int32).astype(int) - values.view(np.int32))
    assert set(off) == {0, 1, 2} and moved[0] == 0.5 and moved[-1] == 4


def test_stores_and_loads_may_touch_several_tensors() -> None:
    a, b = torch.arange(4, dtype=torch.int32), torch.arange(4, dtype=torch.int32) + 10
    memory = Memory([a, b])
    addresses = np.array([b.data_ptr(), a.data_ptr() + 12, b.data_ptr() + 4])
    assert memory.load(addresses, 32, 1).tolist() == [[10, 3, 11]]
    memory.store(addresses, 32, [np.array([7, 8, 9])])
    assert a.tolist() == [0, 1, 2, 8] and b.tolist() == [7, 9, 12, 13]
    with pytest.raises(AccessProblem):
        memory.load(np.array([0]), 32, 1)
