"""What a program moves, read from its text: a short one by hand, and the recorded steps."""

import json
from collections import Counter

import hlo
import pytest
import roofline
import trace_groups

from jaxgpt.planning import target
from jaxgpt.planning.gpus import find_gpu

# A loop of three turns with a product whose left side is sliced and whose result is accumulated in
# place, and an element-wise kernel that updates one row; then one kernel outside the loop.
PROGRAM = """
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/jaxgpt/model/loss.py"

FunctionNames
1 "_forward.<locals>.one_chunk"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%product (p0: bf16[3,8,16], p1: s32[], p2: bf16[16,32], p3: f32[8,32]) -> (f32[8,32], s8[4096]) {
  %p0 = bf16[3,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %left = bf16[8,16]{1,0} bitcast(%slice)
  %p2 = bf16[16,32]{1,0} parameter(2)
  %p3 = f32[8,32]{1,0} parameter(3)
  ROOT %gemm = (f32[8,32]{1,0}, s8[4096]{0}) custom-call(%left, %p2, %p3), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="dot" stack_frame_id=1}, \
backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}
}

%update (q0: f32[3,32], q1: s32[], q2: f32[1,32]) -> f32[3,32] {
  %q0 = f32[3,32]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[1,32]{1,0} parameter(2)
  %none = s32[] constant(0)
  ROOT %put = f32[3,32]{1,0} dynamic-update-slice(%q0, %q2, %q1, %none)
}

%body (arg: (s32[], f32[3,32])) -> (s32[], f32[3,32]) {
  %arg = (s32[], /*index=1*/f32[3,32]{1,0}) parameter(0)
  %a = bf16[3,8,16]{2,1,0} get-tuple-element(%arg), index=0
  %i = s32[] get-tuple-element(%arg), index=1
  %w = bf16[16,32]{1,0} get-tuple-element(%arg), index=2
  %c = f32[8,32]{1,0} get-tuple-element(%arg), index=3
  %rows = f32[3,32]{1,0} get-tuple-element(%arg), index=4
  %row = f32[1,32]{1,0} get-tuple-element(%arg), index=5
  %f1 = (f32[8,32]{1,0}, s8[4096]{0}) fusion(%a, %i, %w, %c), kind=kCustom, calls=%product
  %f2 = f32[3,32]{1,0} fusion(%rows, %i, %row), kind=kLoop, calls=%update
  ROOT %out = (s32[], f32[3,32]{1,0}) tuple(%i, %f2)
}

ENTRY %main (x: f32[3,32]) -> f32[3,32] {
  %x = f32[3,32]{1,0} parameter(0)
  %start = (s32[], f32[3,32]{1,0}) tuple(%x)
  %loop = (s32[], f32[3,32]{1,0}) while(%start), condition=%body, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %last = f32[3,32]{1,0} get-tuple-element(%loop), index=1
  ROOT %copied = f32[3,32]{1,0} copy(%last)
}
"""


def test_kernels_bytes_and_flops_of_a_program() -> None:
    product, update, copy = hlo.Program(PROGRAM).kernels()
    assert [k.times for k in (product, update, copy)] == [3, 3, 1]
    assert [k.in_loop for k in (product, update, copy)] == [True, True, False]
    assert product.product == hlo.Product(batch=1, M=8, N=32, K=16, dtype="bf16")
    assert product.product.flops == 2 * 8 * 32 * 16
    # One of three slices, the weights and the sum; cuBLAS's workspace is no result.
    assert product.read == 2 * 8 * 16 + 4 + 2 * 16 * 32 + 4 * 8 * 32
    assert product.written == 4 * 8 * 32
    assert product.sources == "loss._forward"
    # The updated row, and neither of the others.
    assert (update.read, update.written) == (4 + 4 * 32, 4 * 32)
    assert (copy.read, copy.written) == (4 * 3 * 32, 4 * 3 * 32)


def test_a_traces_time_belongs_to_the_part_that_a_kernel_or_what_it_fuses_is_in(
    monkeypatch,
) -> None:
    cfg = roofline.config_of("124m-b32", "adamw")
    ms = Counter({"gemm": 2.0, "f1": 0.25, "copied": 1.0, "memset": 0.5})
    found = trace_groups.compare(cfg, PROGRAM, ms, roofline.RATES["h200"])
    measured = {name: group["measured_ms"] for name, group in found["groups"].items()}
    assert (measured["blocks, products"], measured["optimizer"]) == (2.25, 1.0)
    assert (found["measured_ms"], found["not_in_the_program_ms"]) == (3.75, 0.5)
    assert "| blocks, products | 2.25 |" in trace_groups.table(found)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["h100", "rtx4090"])
def test_a_step_moves_no_more_bytes_than_recorded(gpu) -> None:
    """Such as float32 copies of the residual stream, which an H100's program does not have."""
    if reason := target.obstacle(find_gpu(gpu)):
        pytest.skip(f"XLA's compiler for cards: {reason}")
    rows = json.loads(roofline.RESULTS.read_text())["rows"]
    mine = [r for r in rows if (r["shape"], r["optimizer"], r["gpu"]) == ("124m-b32", "adamw", gpu)]
    found = roofline.measure("124m-b32", "adamw", gpu)
    assert found["bytes_per_token"] == pytest.approx(mine[-1]["bytes_per_token"], rel=0.02)
    assert found["launches"] == pytest.approx(mine[-1]["launches"], rel=0.02)
