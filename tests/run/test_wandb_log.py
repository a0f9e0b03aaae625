"""W&B's own offline files are read where wandb is installed; a stand-in is enough for the rest."""

import json
import os
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from jaxgpt.run.metrics_file import read_metrics
from jaxgpt.run.wandb_log import WandbLog


class Recorder:
    """A stand-in for wandb and its run, which notes what it is given."""

    def __init__(self, fails: frozenset[str] = frozenset()) -> None:
        self.fails = fails
        self.given: dict[str, object] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False
        self.config = SimpleNamespace(update=lambda values, **_: self._note("config"))

    def _note(self, call: str) -> None:
        if call in self.fails:
            raise RuntimeError(f"{call} failed")

    def init(self, **given: object) -> "Recorder":
        self._note("init")
        self.seconds = os.environ["WANDB_INIT_TIMEOUT"]
        self.given = given
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._note("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._note("finish")
        self.finished = True


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Logs steps as one start of `train` does; returns what wandb got and what was said."""

    def run(
        resume_step: int | None, steps: range, fails: frozenset[str] = frozenset()
    ) -> tuple[Recorder, list[str]]:
        recorder, said = Recorder(fails), list[str]()
        module = ModuleType("wandb")
        vars(module).update(init=recorder.init, Settings=dict)
        monkeypatch.setitem(sys.modules, "wandb", module)
        with WandbLog("books", tmp_path / "mine", resume_step, said.append, lambda: True) as log:
            log.hparams({"n_layer": 2})
            for step in steps:
                log.scalars(step, {"train/loss": float(step)})
        return recorder, said

    return run


def test_a_resumed_run_continues_on_wandb_without_logging_a_step_twice(start, tmp_path):
    first, _ = start(None, range(8))
    second, _ = start(4, range(5, 7))  # killed after step 7, and again after step 6
    third, _ = start(4, range(5, 11))
    given = first.given
    assert (given["project"], given["name"], given["resume"]) == ("books", "mine", "allow")
    assert given["id"] == second.given["id"] == third.given["id"]
    logged = [step for one in (first, second, third) for step, _ in one.logged]
    assert logged == [*range(11)]
    assert [record["step"] for record in read_metrics(tmp_path / "mine/metrics.jsonl")] == logged
    assert first.finished


def test_another_run_in_the_folder_is_another_on_wandb(start):
    first, _ = start(None, range(1))
    second, _ = start(None, range(1))
    assert first.given["id"] != second.given["id"]
    assert [step for step, _ in second.logged] == [0]


def test_wandb_may_take_half_a_minute_to_answer_or_as_long_as_the_user_says(start, monkeypatch):
    monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
    assert start(None, range(1))[0].seconds == "30"
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "200")
    assert start(None, range(1))[0].seconds == "200"


@pytest.mark.parametrize("fails", ["init", "config", "log", "finish"])
def test_a_failure_of_wandb_is_said_once_and_ends_nothing(start, tmp_path, fails):
    recorder, said = start(None, range(3), frozenset({fails}))
    assert len(said) == 1
    assert f"training continues, and the run's own files have them all: {fails} failed" in said[0]
    assert [record["step"] for record in read_metrics(tmp_path / "mine/metrics.jsonl")] == [0, 1, 2]
    assert bool(recorder.logged) == (fails == "finish")


def test_a_missing_wandb_is_answered_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    with WandbLog("books", tmp_path / "run", None, said.append, lambda: True) as log:
        log.scalars(0, {"train/loss": 1.0})
    assert len(said) == 1
    assert "pip install -e '.[wandb]'" in said[0]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def offline_records(path: Path) -> list[bytes]:
    """The records of an offline run, kept in LevelDB's log format after a header of 7 bytes."""
    data, position, records = path.read_bytes(), 7, []
    while position < len(data):
        _, length, part = struct.unpack_from("<IHB", data, position)
        assert part == 1  # a record in one piece
        records.append(data[position + 7 : position + 7 + length])
        position += 7 + length
    return records


@pytest.mark.slow  # 10 s, most of it for wandb's start and end
def test_wandb_itself_has_every_step_once_after_a_resume(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs pip install -e '.[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    for resume_step, steps in ((None, range(8)), (4, range(5, 11))):
        with WandbLog("books", tmp_path, resume_step, said.append, lambda: True) as log:
            log.hparams({"n_layer": 2})
            for step in steps:
                log.scalars(step, {"train/loss": step / 2})
                log.scalars(step, {"val/loss": step / 4})
    wandb.teardown()  # its process writes the end of the file
    assert said == []
    logged, runs, configured = [], set(), set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, offline_records(path)):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.add((record.run.project, record.run.run_id))
            if kind in ("run", "config"):
                updates = (record.run.config if kind == "run" else record.config).update
                configured |= {(update.key, update.value_json) for update in updates}
            if kind == "history":
                items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                logged.append([json.loads(items[x]) for x in ("_step", "train/loss", "val/loss")])
    assert logged == [[step, step / 2, step / 4] for step in range(11)]
    assert len(runs) == 1
    assert ("n_layer", "2") in configured
