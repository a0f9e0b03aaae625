"""Counting in a compiled program's text what devices say to each other."""

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


def test_collectives_are_counted_as_often_as_the_loops_around_them_go_round() -> None:
    assert SCRIPT["collectives"](PROGRAM) == {
        "all-gather": {"count": 6, "bytes": 6 * 256, "largest_bytes": 256},
        "reduce-scatter": {"count": 4, "bytes": 3 * 144 + 4 * 16, "largest_bytes": 144},
        "all-reduce": {"count": 1, "bytes": 400, "largest_bytes": 400},
    }


def test_a_loop_of_unknown_length_is_not_taken_for_one_round() -> None:
    with pytest.raises(AssertionError, match="unknown length"):
        SCRIPT["collectives"](PROGRAM.replace("known_trip_count", "trips"))


def test_the_page_shows_what_is_estimated_on_paper(capsys) -> None:
    runpy.run_path(str(ROOT / "benchmarks" / "estimate_scaling.py"))["main"]()
    assert capsys.readouterr().out in (ROOT / "docs" / "scaling.md").read_text()


def test_the_page_shows_what_was_compiled_and_each_card_holds_its_share() -> None:
    rows = json.loads(SCRIPT["RESULTS"].read_text())["rows"]
    assert SCRIPT["table"](rows) in (ROOT / "docs" / "scaling.md").read_text()
    for row in rows:
        gathers = row["collectives"].get("all-gather", {"largest_bytes": 0})
        whole = 2 * row["parameters"]  # all of them, in bfloat16
        assert gathers["largest_bytes"] < whole / 2, row
        case = SCRIPT["Case"](**{field: row[field] for field in CASE_FIELDS})
        guess = estimate(SCRIPT["config_of"](case)).peak_bytes
        assert abs(guess / row["peak_bytes"] - 1) < ESTIMATE_ERROR, row
        if "fsdp" in (row["mesh"] or "") and row["remat"] == "full":
            m, A = SCRIPT["config_of"](case).model, row["gradient_accumulation_steps"]
            ends = (m.vocab_size + m.block_size) * m.n_embd
            # In each micro-batch the blocks twice in bfloat16, so none is kept from one pass to the
            # other or from one micro-batch to the next; the embeddings once in float32.
            told = A * (2 * 2 * (row["parameters"] - ends) + 4 * ends)
            assert gathers["bytes"] == pytest.approx(told, rel=1e-3), row
            summed = row["collectives"]["reduce-scatter"]["bytes"]
            assert summed == pytest.approx(A * 4 * row["parameters"], rel=1e-3), row
        if row["mesh"] == "data=8":
            assert set(row["collectives"]) == {"all-reduce"}, row
            mean = row["collectives"]["all-reduce"]["bytes"] / (4 * row["parameters"])
            assert 1 <= mean < 1.001, row  # once a step, not once a micro-batch
