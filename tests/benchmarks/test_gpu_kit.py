"""The quarter of an hour on a card: parts that hang, what a trace says, and all of it in small."""

import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import jaxgpt
from jaxgpt.bench import BenchFlags
from jaxgpt.config.command_line import parse_run

KIT = Path(jaxgpt.__file__).parents[1] / "benchmarks" / "gpu"
# A CPU has no peak for MFU, no count of memory, and no kernels in a trace.
ONLY_ON_A_CARD = {"b32, MFU", "trace, share of time without a kernel"} | {
    f"{name}, real / compiled peak" for name in ("24gb", "b32", "b64", "24gb-774m", "80gb-350m")
}


@pytest.fixture
def kit(monkeypatch):
    """A module of the kit by its name."""
    monkeypatch.syspath_prepend(str(KIT))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_a_part_that_hangs_keeps_what_it_printed_and_the_next_one_runs(kit, tmp_path) -> None:
    session = kit("session").Session("first", 60.0, tmp_path, tmp_path, os.environ)
    session.log.touch()
    program = "import time; print('{\"item\": \"b64\"}', flush=True); print('{'); time.sleep(60)"
    session.run("hangs", 0, 1.0, [sys.executable, "-c", program])
    session.run("fails", 0, 9.0, [sys.executable, "-c", "raise SystemExit('no')"])
    session.run("never", 1e3, 9.0, [sys.executable, "-c", ""])
    saved = json.loads((tmp_path / "first.json").read_text())
    outcomes = {part["part"]: part["outcome"] for part in saved["parts"]}
    assert outcomes["hangs"] == "killed at its limit"
    assert outcomes["fails"] == "exit code 1"
    assert outcomes["never"].startswith("not begun")
    assert saved["results"]["hangs"] == [{"item": "b64"}]
    assert {line["measured"] for line in saved["lines"]} == {None}


@pytest.mark.parametrize("crashing", [(), ("scheduler-on",), ("as-it-is", "attention-plain")])
@pytest.mark.parametrize("already_when_compiled", [False, True])
def test_an_item_that_ends_its_process_costs_only_itself(
    kit, tmp_path, monkeypatch, crashing, already_when_compiled
) -> None:
    module = kit("session")
    session = module.Session("second", 600.0, tmp_path, tmp_path, {})

    def run(self, name: str, least: float, limit: float, command: list) -> int:
        if name == "ablations":
            items = [word for word in command if word in kit("shapes").ABLATIONS]
            found = self.results.setdefault(name, [])
            side_by_side = command[command.index("--workers") + 1] > 1
            for item in items:
                found.append({"item": item, "begun": True})
                if item in crashing or (crashing and side_by_side and already_when_compiled):
                    return -11
                found.append({"item": item, "step_ms": 1.0})
        return 0

    monkeypatch.setattr(module.Session, "run", run)
    kit("quarter_hour").second(session)
    measured = [r["item"] for r in session.results["ablations"] if "step_ms" in r]
    assert sorted(measured) == sorted(set(kit("shapes").ABLATIONS) - set(crashing))


def test_a_process_that_cannot_start_is_not_started_again(kit, tmp_path, monkeypatch) -> None:
    skip = ["resume", "memory"]
    session = kit("session").Session("second", 60.0, tmp_path, tmp_path, os.environ, skip)
    session.log.touch()
    failing = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(kit("quarter_hour"), "steps_command", lambda *_: failing)
    kit("quarter_hour").second(session)
    begun = [part["part"] for part in session.parts if part["outcome"] == "exit code 1"]
    assert begun == ["ablations", "ablations"]  # side by side, and one after the other


def test_a_prediction_is_compared_with_what_was_measured(kit) -> None:
    predictions = kit("predictions")
    results = {"bench-b32": [{"tokens_per_second": 510e3}]}

    def row(device: str) -> dict:
        rows = predictions.table(predictions.FIRST, results, device)
        return next(row for row in rows if row["line"] == "b32, tokens/s")

    assert predictions.verdict(row("NVIDIA H100 80GB HBM3")) == "NOT as predicted"
    assert predictions.verdict(row("NVIDIA H200")) == ""  # nothing was predicted for it
    results["bench-b32"][0]["tokens_per_second"] = 430e3
    assert predictions.verdict(row("NVIDIA H100 80GB HBM3")) == "as predicted"


def test_a_trace_is_read_by_kind_and_by_name(kit, tmp_path) -> None:
    def event(name: str, tid: int, start: float, us: float, pid: int = 1) -> dict:
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": us}

    def called(kind: str, name: str, pid: int, tid: int = 0) -> dict:
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

    events = [
        called("process_name", "/device:GPU:0", 1),
        called("process_name", "/host:CPU", 2),
        called("thread_name", "Stream #14", 1, 14),
        called("thread_name", "XLA Ops", 1, 15),
        event("nvjet_tst_128x256", 14, 0, 50),
        event("cudnn_generated_fort_native_sdpa_fprop", 14, 50, 20),
        event("loop_fusion_3", 14, 90, 10),
        event("loop_fusion_17", 14, 100, 5),
        event("fusion.3", 15, 0, 105),
        event("python", 9, 0, 500, pid=2),
    ]
    path = tmp_path / "perfetto_trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = kit("trace_step").read_trace(path)
    assert found["kinds_ms"] == {"products": 0.05, "attention": 0.02, "element-wise": 0.015}
    assert [(k["name"], k["count"]) for k in found["top"]][-1] == ("loop_fusion", 2)
    assert found["wall_ms"] == pytest.approx(0.105)
    assert found["gaps_share"] == pytest.approx(20 / 105)


def test_the_flags_of_the_real_runs_are_valid(kit, tmp_path) -> None:
    """A trial has others: tiny shapes on the CPU."""
    shapes = kit("shapes")
    session = kit("session").Session("first", 60.0, tmp_path, tmp_path, {})
    runs = [shapes.flags_of(item, False) for item in shapes.ITEMS.values()]
    runs += [kit("kill_resume").run_flags(False, 600), kit("quarter_hour").run_flags(session, 200)]
    for flags in runs:
        asked = parse_run(BenchFlags, flags, prog="", description="", default_preset=str)[0]
        assert asked.device == "gpu"
        assert asked.model.vocab_size == 50304


@pytest.mark.slow
def test_all_of_it_in_small(kit, tmp_path) -> None:
    """nanoGPT's parts need its model.py, and are skipped with the reason."""
    folders = {"OUT": tmp_path / "out", "QUARTER_WORK": tmp_path / "work"}
    nothing = {"NANOGPT": tmp_path / "nanogpt", "QUARTER_WHEELS": tmp_path / "whl"}
    environment = {**os.environ, **{k: str(v) for k, v in (folders | nothing).items()}}
    command = [sys.executable, str(KIT / "quarter_hour.py"), "trial", "900"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "out" / "trial.json").read_text())
    outcomes = {part["part"]: part["outcome"] for part in saved["parts"]}
    skipped = {name for name in outcomes if outcomes[name].startswith("skipped: no model.py")}
    assert skipped == {"nanogpt-b32", "nanogpt-train", "nanogpt-b64"}
    assert {outcomes[name] for name in outcomes if name not in skipped} == {"exit code 0"}
    measured = {line["line"]: line["measured"] for line in saved["lines"]}
    missing = {name for name, value in measured.items() if value is None}
    assert missing == ONLY_ON_A_CARD | {name for name in measured if "nanoGPT" in name}
    assert all(f"\n{name} " in done.stdout for name in measured)
    right = [line for line in saved["lines"] if line["line"] in RIGHT]
    assert all(line["low"] <= line["measured"] <= line["high"] for line in right)
    assert len(right) == len(RIGHT)
    assert len(list((tmp_path / "out").iterdir())) <= 4
    assert outcomes.keys() - {"versions", "imports"} == set(kit("quarter_hour").PARTS)


def test_a_part_that_is_skipped_does_not_run(kit, tmp_path, capsys) -> None:
    skip = kit("quarter_hour").PARTS
    session = kit("session").Session("trial", 60.0, tmp_path, tmp_path, os.environ, skip)
    session.log.touch()
    kit("quarter_hour").first(session)
    kit("quarter_hour").second(session)
    assert {part["part"] for part in session.parts} == set(skip)
    assert all(part["outcome"].startswith("skipped: as asked") for part in session.parts)
    with pytest.raises(SystemExit):
        kit("quarter_hour").main(["trial", "900", "--skip", "atention"])
    assert "invalid choice: 'atention'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_missing_package_ends_the_call_at_once(tmp_path) -> None:
    site = tmp_path / "work" / "site"
    site.mkdir(parents=True)
    for name in ("msgspec", "zstandard"):
        text = f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        (site / f"{name}.py").write_text(text)
    folders = {"OUT": tmp_path / "out", "QUARTER_WORK": tmp_path / "work"}
    folders["QUARTER_WHEELS"] = tmp_path / "whl"
    environment = {**os.environ, **{k: str(v) for k, v in folders.items()}}
    command = [sys.executable, str(KIT / "quarter_hour.py"), "trial", "900"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "not installed: msgspec, zstandard; QUARTER_WHEELS names" in done.stdout
    saved = json.loads((tmp_path / "out" / "trial.json").read_text())
    assert [part["part"] for part in saved["parts"]] == ["versions", "imports"]


# Predictions that hold on a CPU too.
RIGHT = {
    "attention, largest relative error",
    "bfloat16 and float32, loss of step 1",
    "bfloat16 and float32, any step",
    "kill -9 and resume, share of losses equal",
    "train, sample, evaluate, export: failed",
    "evaluated and logged loss",
    "deterministic, same bits twice",
}
