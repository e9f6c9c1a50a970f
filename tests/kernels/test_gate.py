"""Compiled code against the limits of :mod:`tests.kernels.gate`."""

from __future__ import annotations

import pytest

from tests.kernels import gate, processor, sass

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("capability", sorted(processor.GPUS))
@pytest.mark.parametrize("variant", gate.GATES, ids=lambda each: each.name)
def test_compiled_code_is_within_its_limits(variant: gate.Gate, capability: int) -> None:
    cost = gate.cost(variant, capability)
    assert cost.spills == 0, cost
    assert cost.instructions <= variant.instructions, cost
    assert cost.registers <= variant.registers[capability], cost
    assert cost.share >= variant.share[capability], cost


# Launch, the kernel that ends it, and the least share with both kernels.
ENDS = [
    ("stats(2, targets=True)", "row_statistics_kernel", gate.GATES[0], 0.92),
    ("sample(2)", "row_sample_kernel", gate.GATES[1], 0.88),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "kernel", "variant", "least"), ENDS, ids=["statistics", "sample"]
)
def test_512_rows_keep_their_share_with_the_kernel_that_ends_them(
    launch: str, kernel: str, variant: gate.Gate, least: float
) -> None:
    gpu = processor.GPUS[90]
    copy = gate.ROWS * gate.VOCAB * gate.ELEMENT / gpu.copy
    pass_ = copy / gate.cost(variant, 90).share
    assert copy / (pass_ + gate.end_of(launch, kernel, 90)) >= least


LISTING = """
entry_code:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   FADD R8, R4, R5 ;
        /*0040*/             @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/              @P2 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   MUFU.EX2 R9, R8 ;
        /*0070*/             @!P3 BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/                   STG.E [R2.64], R9 ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4) ;
        /*00b0*/                   NOP;
"""


def test_the_usual_way_takes_the_loop_and_skips_what_is_special() -> None:
    path = sass.usual_path(sass.parse(LISTING), 3)
    assert [each.opcode for each in path] == [
        "S2R", "BRA", *["LDG.E.128", "FADD", "BRA"] * 3, "BRA", "STG.E", "EXIT",
    ]  # fmt: skip
    load, add = path[2], path[3]
    assert load.writes == ("R4", "R5", "R6", "R7") and load.reads == ("R2",)
    assert add.writes == ("R8",) and add.reads == ("R4", "R5")


def test_a_way_through_a_call_is_refused() -> None:
    """As where the machine code has a subroutine for what is special, behind the end."""
    called = LISTING.replace("STG.E [R2.64], R9", "CALL.REL.NOINC `(.L_x_0)")
    with pytest.raises(AssertionError, match="usual way"):
        sass.usual_path(sass.parse(called), 3)


def _loads(count: int) -> list[sass.Instruction]:
    return [sass.Instruction("LDG.E.128", (f"R{number}",), ()) for number in range(count)]


def test_loads_alone_run_at_the_speed_of_the_memory() -> None:
    gpu = processor.GPUS[90]
    taken = processor.cycles(_loads(64), gpu, 64, 4, 8)
    assert 64 * 4 * 64 * 512 / gpu.bytes_per_cycle / taken == pytest.approx(1, abs=0.02)


def test_what_waits_for_each_load_needs_more_warps() -> None:
    """By Little's law: one warp has 512 bytes under way, in a latency."""
    gpu = processor.GPUS[90]
    path = [
        each
        for number in range(16)
        for each in (
            sass.Instruction("LDG.E.128", ("R1",), ()),
            sass.Instruction("FADD", (f"R{number + 2}",), ("R1",)),
        )
    ]
    taken = processor.cycles(path, gpu, 4, 4, 1)
    assert taken >= 4 * 16 * processor.DRAM_LATENCY
    assert taken > 3 * processor.cycles(path, gpu, 4, 4, 4)


def test_the_special_unit_binds() -> None:
    gpu = processor.GPUS[90]
    path = [sass.Instruction("MUFU.EX2", (f"R{number}",), ()) for number in range(100)]
    assert processor.cycles(path, gpu, 8, 4, 8) == pytest.approx(8 * 100 * 8, rel=0.02)
