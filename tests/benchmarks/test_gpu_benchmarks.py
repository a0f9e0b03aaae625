"""The list of measurements on a GPU: one file each, in the time given, and how they end."""

import json
import runpy
from pathlib import Path

import pytest

import jaxgpt

ROOT = Path(jaxgpt.__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "performance_table.py"))
GPU = runpy.run_path(str(ROOT / "benchmarks" / "run_gpu_benchmarks.py"))


@pytest.mark.parametrize("trial", [True, False])
def test_every_measurement_has_its_own_file_and_a_row_in_the_table(trial) -> None:
    parts = ("ceilings", "train", "ablations", "memory")
    args = GPU["parse_args"]([str(ROOT), "--parts", *parts])
    args.parts, args.trial = (*parts, "nanogpt"), trial
    jobs = list(GPU["jobs"](args))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    patterns = [Path(f"{name}.json") for name in names if not name.startswith("memory-plan")]
    assert all(any(path.match(p) for p in SCRIPT["ROWS"]) for path in patterns)


def test_the_time_limit_is_kept_and_nothing_is_measured_twice(
    tmp_path, capsys, monkeypatch
) -> None:
    run = GPU["main"]
    flags = [str(ROOT), "--parts", "ceilings", "memory", "--trial", "--out", str(tmp_path)]
    assert run([*flags, "--seconds", "1"]) == 1
    assert "no time left for gpu-ceilings, memory-real-demo" in capsys.readouterr().out
    for name in ("gpu-ceilings", "memory-real-demo", "memory-plan-demo"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert run([*flags, "--seconds", "1"]) == 0


@pytest.mark.slow
def test_what_fails_or_takes_too_long_leaves_its_log_and_no_figures(tmp_path) -> None:
    import sys

    for program, outcome in (
        ("import sys; sys.exit('no')", "exit code 1"),
        ("import time; time.sleep(60)", "stopped after 1 seconds"),
    ):
        job = GPU["Job"]("x", [sys.executable, "-c", program], writes=False)
        assert GPU["measure"](job, tmp_path / "x.json", 1.0) == outcome
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.log"]


def test_a_runs_step_is_timed_from_log_line_to_log_line(tmp_path, monkeypatch) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "compare_train.py"))

    def run(command: str, flags: list[str]) -> str:
        folder = Path(flags[flags.index("--out-dir") + 1])
        folder.mkdir()
        # The first evaluation lies before the first line; the last one before the line of step 60.
        times = {0: 0.0, 10: 100.0, 20: 101.0, 50: 104.0, 60: 999.0}
        lines = [json.dumps({"step": step, "time": time}) for step, time in times.items()]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return ""

    monkeypatch.setitem(script["train"].__globals__, "run", run)
    assert script["train"]([], 60) == pytest.approx(100)
