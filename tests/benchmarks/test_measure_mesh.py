"""The collectives counted in a compiled program's text, and the estimate of what a mesh needs."""

import json
import runpy
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt.planning.memory import ESTIMATE_ERROR, estimate

ROOT = Path(jaxgpt.__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "measure_mesh.py"))
CASE_FIELDS = SCRIPT["Case"].__dataclass_fields__
PROGRAM = """HloModule step

%inner (p: f32[8]) -> f32[64] {
  %p = f32[8]{0} parameter(0)
  ROOT %ag = ((f32[8]{0}), f32[64]{0}) all-gather-start(%p), dimensions={0}
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"2"}}
  %rs = ((bf16[64]{0}, bf16[8]{0}), (bf16[8]{0}, bf16[1]{0})) reduce-scatter-start(%a, %b), to_apply=%add
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %rs.1 = f32[4]{0} reduce-scatter(%p), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, to_apply=%add
  %w.1 = (s32[], f32[8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %ar = f32[100]{0} all-reduce(%p), to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_counted_once_for_each_repetition_of_the_loops_around_them() -> None:
    assert SCRIPT["collectives"](PROGRAM) == {
        "all-gather": {"count": 6, "bytes": 6 * 256, "largest_bytes": 256},
        "reduce-scatter": {"count": 4, "bytes": 3 * 144 + 4 * 16, "largest_bytes": 144},
        "all-reduce": {"count": 1, "bytes": 400, "largest_bytes": 400},
    }


def test_a_loop_of_unknown_length_is_refused() -> None:
    with pytest.raises(AssertionError, match="unknown length"):
        SCRIPT["collectives"](PROGRAM.replace("known_trip_count", "trips"))


@pytest.mark.slow
def test_the_estimate_is_as_near_to_the_compiler_as_it_says_on_a_mesh() -> None:
    for row in json.loads(SCRIPT["RESULTS"].read_text())["rows"]:
        case = SCRIPT["Case"](**{field: row[field] for field in CASE_FIELDS})
        guess = estimate(SCRIPT["config_of"](case)).peak_bytes
        assert abs(guess / row["peak_bytes"] - 1) < ESTIMATE_ERROR, row
