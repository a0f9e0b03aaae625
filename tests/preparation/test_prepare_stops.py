"""Resuming preparations that were killed, were stopped or filled the disk."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.preparing import SMALL, contents, prepare, refusal, start, wait_for, worker_pids


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(
    fineweb_like: Path, prepared: Path, tmp_path: Path, children: list[subprocess.Popen]
) -> None:
    draw, out = random.Random(4), tmp_path / "out"
    patterns = (".prepare/plan.json", ".prepare/parts/*", "*_train_000001.bin")
    for workers, pattern in enumerate(patterns, start=1):
        child = start(children, fineweb_like, "--out", out, *SMALL, "--workers", workers)
        wait_for(out, pattern)
        time.sleep(draw.uniform(0, 0.02))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (out / "manifest.json").exists(), "killed too late to prove anything"
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert finished
    assert prepare(fineweb_like, "--out", out, *SMALL) == 0
    assert contents(out) == contents(prepared)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "written again"
    assert not any((out / ".prepare" / "parts").iterdir())


def test_ctrl_c_while_workers_start_prints_one_line(
    fineweb_like: Path, tmp_path: Path, children: list[subprocess.Popen]
) -> None:
    out = tmp_path / "out"
    child = start(children, fineweb_like, "--out", out, *SMALL, "--workers", "2", session=True)
    wait_for(out, ".prepare/parts")  # a worker starts right after, and imports for half a second
    time.sleep(0.2)
    for _ in range(2):  # by someone in a hurry
        os.killpg(child.pid, signal.SIGINT)  # a terminal's reaches workers too
        time.sleep(0.005)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors == "\npython -m jaxgpt.prepare: stopped; run the same command again to resume\n"


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stopped_run_says_how_to_resume_and_does(
    fineweb_like: Path,
    prepared: Path,
    tmp_path: Path,
    children: list[subprocess.Popen],
    sent: signal.Signals,
    code: int,
) -> None:
    out = tmp_path / "out"
    child = start(children, fineweb_like, "--out", out, *SMALL, "--workers", "2")
    wait_for(out, ".prepare/parts/*")
    child.send_signal(sent)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code
    assert errors == "\npython -m jaxgpt.prepare: stopped; run the same command again to resume\n"
    assert prepare(fineweb_like, "--out", out, *SMALL) == 0
    assert contents(out) == contents(prepared)


def test_an_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SIGINT is in what a script runs in the background."""
    seen = []
    monkeypatch.setattr(
        "jaxgpt.prepare.run", lambda _: seen.extend(map(signal.getsignal, (2, 15))) or 0
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert prepare("fineweb") == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[0] is signal.SIG_IGN
    assert seen[1] not in (signal.SIG_IGN, signal.SIG_DFL)


def test_workers_do_not_outlive_a_parent_that_is_killed(
    fineweb_like: Path, tmp_path: Path, children: list[subprocess.Popen]
) -> None:
    child = start(children, fineweb_like, "--out", tmp_path / "out", *SMALL, "--workers", "2")
    wait_for(tmp_path / "out", ".prepare/parts/*")
    workers = worker_pids(child.pid)
    assert workers
    child.kill()
    child.wait()
    deadline = time.monotonic() + 10
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_second_run_in_the_same_folder_is_refused(
    fineweb_like: Path, tmp_path: Path, children: list[subprocess.Popen], capsys
) -> None:
    out = tmp_path / "out"
    child = start(children, fineweb_like, "--out", out, *SMALL, "--workers", "1")
    wait_for(out, ".prepare/plan.json")
    os.kill(child.pid, signal.SIGSTOP)
    try:
        message = refusal(capsys, fineweb_like, "--out", out, *SMALL)
    finally:
        os.kill(child.pid, signal.SIGCONT)
    assert f"is in use by process {child.pid} on " in message


def test_a_finished_folder_is_not_changed(
    fineweb_like: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> dict[Path, int]:
        files = [path for path in prepared.rglob("*") if path.is_file() and path.name != "lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert len(before) > 5
    assert prepare(fineweb_like, "--out", prepared, *SMALL) == 0
    assert "is complete; there is nothing to do" in capsys.readouterr().out
    assert times() == before


def test_a_full_disk_is_reported_and_the_run_resumes(
    fineweb_like: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = (
        "import resource, sys; from jaxgpt.prepare import main\n"
        "limit = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "sys.exit(main(sys.argv[2:]))"
    )
    for limit in ("30000", "60000"):  # less than a unit's tokens, less than a shard
        command = [sys.executable, "-c", code, limit, str(fineweb_like), "--out", str(out), *SMALL]
        full = subprocess.run(command, capture_output=True, text=True)
        assert full.returncode == 2
        assert "File too large; fix that and run the same command again" in full.stderr
        assert len(full.stderr.strip().splitlines()) == 1, full.stderr
    assert prepare(fineweb_like, "--out", out, *SMALL) == 0
    assert contents(out) == contents(prepared)


def test_output_that_cannot_be_written_is_no_error(texts: Path, tmp_path: Path) -> None:
    out, straight = tmp_path / "a" / "out", tmp_path / "b" / "out"
    command = [sys.executable, "-m", "jaxgpt.prepare", str(texts), "--out", str(out)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=full, timeout=120)
    assert done.returncode == 0
    assert prepare(texts, "--out", straight) == 0
    assert contents(out) == contents(straight)


def test_a_corrupt_file_stops_the_run_and_keeps_finished_shards(
    fineweb_like: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for path in fineweb_like.glob("*.parquet"):
        (folder / path.name).write_bytes(path.read_bytes())
    last = sorted(folder.glob("*.parquet"))[-1]
    whole = last.read_bytes()
    middle = len(whole) // 2
    last.write_bytes(whole[:middle] + bytes(2000) + whole[middle + 2000 :])
    message = refusal(capsys, folder, "--out", out, *SMALL, "--workers", "1")
    assert f"{last}: " in message
    assert any(out.glob("*.bin"))
