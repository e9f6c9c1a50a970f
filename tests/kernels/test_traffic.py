"""Bytes that each kernel moves, against the least that it can: in the interpreter, no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from egspo_kernels.shared.objective import Objective, Steps
from tests.helpers.marks import first_fast
from tests.kernels.aot import bytes_moved
from tests.kernels.traffic import CASES, LLADA, Case, counted, measured

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")

# Over the least: partial sums of blocks, which are written and read again, row indices, results.
OVERHEAD = 0.01


@pytest.mark.parametrize("case", first_fast(CASES), ids=lambda case: case.name)
def test_logits_are_read_once_and_gradients_written_once(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        traffic = measured(case, dtype)
        least = 2 * LLADA * dtype.itemsize
        assert case.reads * least <= traffic.read <= (case.reads + OVERHEAD) * least
        assert case.writes * least <= traffic.written <= (case.writes + OVERHEAD) * least


def test_a_program_reads_the_values_of_its_own_steps() -> None:
    """And every step id once."""
    from egspo_kernels.triton_kernels import steps as kernels

    tokens, count, near = 4096, 256, 2 * kernels.BLOCK_TOKENS
    ids = torch.arange(tokens) * count // tokens
    objective = Objective(0.2, 0.2, 0.1, "exact", "sum")
    values, per_step = torch.zeros(tokens), torch.zeros(count)
    with counted() as traffic:
        kernels.step_objective(
            objective, values, values, Steps(ids, per_step, per_step, None, None)
        )
    programs = count // kernels.BLOCK_STEPS
    scanned, others = programs * tokens * 8, count * 32
    assert traffic.read <= scanned + (tokens + programs * near) * (8 + 4 + 4) + others


def test_a_second_pass_would_be_seen() -> None:
    @triton.jit
    def twice(source: Any, target: Any, count: Any, BLOCK: tl.constexpr) -> None:
        index = tl.arange(0, BLOCK)
        first = tl.load(source + index, mask=index < count)
        tl.store(target + index, first + tl.load(source + index, mask=index < count))
        tl.store(target, tl.load(target))

    source, target = torch.ones(64, dtype=torch.float16), torch.zeros(64)
    with counted() as traffic:
        twice[(3,)](source, target, 50, BLOCK=64)
    assert (traffic.read, traffic.written) == (3 * (2 * 50 * 2 + 4), 3 * (64 * 4 + 4))
    assert target[:50].eq(2).all()


def test_bytes_by_the_ir_take_the_dearest_branch() -> None:
    ir = """
module {
  tt.func public @kernel(%x: !tt.ptr<bf16>) {
    %0 = tt.load %p, %m, %c : tensor<128x!tt.ptr<bf16>, #blocked> loc(#loc1)
    %1 = tt.load %s : !tt.ptr<i64> loc(#loc2)
    scf.if %c {
      %2 = scf.if %d -> (tensor<64xf32>) {
        %3 = tt.load %q : tensor<64x!tt.ptr<f32>, #blocked> loc(#loc3)
        scf.yield %3 : tensor<64xf32> loc(#loc)
      } else {
        scf.yield %z : tensor<64xf32> loc(#loc)
      } loc(#loc)
      tt.store %t, %2 : tensor<64x!tt.ptr<f32>, #blocked> loc(#loc)
    } else {
      %4 = tt.load %q : tensor<8x4x!tt.ptr<i32>, #blocked> loc(#loc)
      tt.store %t, %4, %m : tensor<2x64x!tt.ptr<f32>, #blocked> loc(#loc)
    } loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""
    assert bytes_moved("load", ir) == 128 * 2 + 8 + 64 * 4
    assert bytes_moved("store", ir) == 128 * 4
