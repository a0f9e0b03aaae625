"""Worker processes that are killed."""

import os
import signal
import subprocess
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.preparing import SMALL, contents, start, wait_for, wait_until, worker_pids

from jaxgpt.data.token_file import token_dtype
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.data.tokenizer_json import character_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import sha256_of
from jaxgpt.preparation import workers
from jaxgpt.preparation.assemble import Assembler
from jaxgpt.preparation.documents import ReadOptions
from jaxgpt.preparation.inputs import find_inputs
from jaxgpt.preparation.pipeline import UnitLoop
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.tokenize import Job, tokens_being_written
from jaxgpt.preparation.work_files import FileSource, Plan, Settings
from jaxgpt.preparation.workers import DeadWorkerError, Pool, run_job

BYTE = load_tokenizer("byte")


def test_a_killed_worker_costs_its_unit_alone(
    fineweb_like: Path, prepared: Path, tmp_path: Path, children: list[subprocess.Popen]
) -> None:
    out = tmp_path / "out"
    child = start(children, fineweb_like, "--out", out, *SMALL, "--workers", "2")
    wait_until(lambda: len(worker_pids(child.pid)) == 2)
    stopped, other = worker_pids(child.pid)  # which still import
    os.kill(stopped, signal.SIGSTOP)
    wait_for(out, ".prepare/parts/??????.train")
    os.kill(stopped, signal.SIGKILL)
    wait_until(lambda: set(worker_pids(child.pid)) - {stopped, other})
    assert other in worker_pids(child.pid), "the other one goes on"
    said, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert "a worker was killed in unit" in said
    assert contents(out) == contents(prepared)


def test_a_pool_replaces_a_process_that_ended() -> None:
    with Pool(1) as pool:
        for _ in range(2):
            ended = pool.submit(os._exit, 3)
            with pytest.raises(DeadWorkerError):
                pool.result(ended)
        assert pool.result(pool.submit(pow, 2, 5)) == 32


class Fragile:
    """An engine in this process, whose workers die the first few times in one unit."""

    tries, waiting = 2, 0.0

    def __init__(self, deaths: int):
        self._deaths = deaths

    def workers(self) -> int:
        return 1

    def submit(self, fn: Any, job: Job) -> Future:
        future: Future = Future()
        if job.number == 1 and self._deaths:
            self._deaths -= 1
            future.set_exception(DeadWorkerError())
        else:
            future.set_result(fn(job))
        return future

    def result(self, future: Future) -> Any:
        return future.result()


@pytest.fixture
def plan(texts: Path, tmp_path: Path) -> Plan:
    """A saved plan with several units."""
    settings = Settings(
        prefix="x",
        tokenizer="byte",
        tokenizer_sha256=BYTE.sha256,
        options=ReadOptions(),
        shard_tokens=5000,
        val_tokens=1000,
        val_fraction=None,
        unit_bytes=1000,
    )
    plan = Plan(source=FileSource(), settings=settings, rounds=[find_inputs([str(texts)])])
    (tmp_path / ".prepare").mkdir()
    plan.save(tmp_path / ".prepare" / "plan.json")
    return plan


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_unit_that_kills_its_worker_twice_is_named(
    plan: Plan, tmp_path: Path, deaths: int, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / ".prepare"
    assembler = Assembler(tmp_path, work, plan, None, BYTE.eot)
    left = work / "parts" / "000001.all.host-1-2.tmp"
    left.touch()
    first = plan.units()[1][0].path
    loop = UnitLoop(Fragile(deaths), assembler, plan, work, PreparationConsole(1, 0), 1.0)
    if deaths == 1:
        loop.run()
        assert assembler.finished
        assert f"a worker was killed in unit 1 ({first}); starting it" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=f"{first}: workers were killed whenever .* unit 1,"):
            loop.run()
    assert not left.exists()


def test_a_worker_that_sees_other_files_is_refused(plan: Plan, tmp_path: Path) -> None:
    parts = tmp_path / ".prepare" / "parts"
    parts.mkdir()
    plan_sha256 = sha256_of(parts.with_name("plan.json"))
    job = Job(0, plan.units()[0], plan.settings, parts, plan_sha256)
    lost = job._replace(unit=(job.unit[0]._replace(path=str(tmp_path / "gone.txt")),))
    elsewhere = job._replace(folder=tmp_path / "elsewhere" / "parts")
    other = job._replace(settings=replace(plan.settings, tokenizer_sha256="0"))
    for some, said in (
        (elsewhere, "elsewhere/plan.json: is missing or another file on"),
        (job._replace(plan_sha256="0"), "plan.json: is missing or another file on"),
        (lost, "gone.txt: is missing on"),
        (other, "tokenizer 'byte': is another one on"),
    ):
        with pytest.raises(UserError, match=said):
            run_job(some)
    assert not any(parts.iterdir())
    assert run_job(job).documents > 0


@pytest.mark.parametrize("error", [MemoryError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "why")])
def test_what_a_worker_cannot_tokenize_is_named(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def tokenize(*_: object) -> None:
        raise error

    monkeypatch.setattr(workers, "_checked_tokenizer", lambda job: BYTE)
    monkeypatch.setattr(workers, "tokenize_unit", tokenize)
    path = plan.units()[0][0].path
    job = Job(0, plan.units()[0], plan.settings, tmp_path, "")
    with pytest.raises(UserError, match=f"^{path}: cannot be tokenized"):
        run_job(job)


def test_a_worker_of_a_cluster_sees_that_the_folders_tokenizer_is_another(
    plan: Plan, tmp_path: Path
) -> None:
    parts = tmp_path / ".prepare" / "parts"
    parts.mkdir()
    plan_sha256 = sha256_of(parts.with_name("plan.json"))
    for characters in ("ab", "abc"):  # one command, and another one
        tokenizer = character_tokenizer(characters)
        tokenizer.save(tmp_path)
        char = replace(plan.settings, tokenizer="char", tokenizer_sha256=tokenizer.sha256)
        assert run_job(Job(0, plan.units()[0], char, parts, plan_sha256)).documents > 0


def test_tokens_being_written_are_counted_in_their_dtype(tmp_path: Path) -> None:
    (tmp_path / "000001.all.host-1-2.tmp").write_bytes(bytes(120))
    assert tokens_being_written(tmp_path, token_dtype(50_257)) == 60
    assert tokens_being_written(tmp_path, token_dtype(151_669)) == 30
