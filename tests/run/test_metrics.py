import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from helpers.events import expected, lines_by_step, log_steps, read_events, tags_by_step
from tensorboardX.proto.event_pb2 import SessionLog

from jaxgpt.errors import UserError
from jaxgpt.run import metrics
from jaxgpt.run.metrics import MetricsLog
from jaxgpt.run.metrics_file import EVENT_FILES, METRICS_FILE, read_metrics
from jaxgpt.run.tensorboard_events import _encode_record, event_files


def test_a_record_is_in_both_files(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "new" / "run") as log:
        log.scalars(3, {"train/loss": 2.5, "train/lr": 0.125})
        log.text(3, "sample", "# no heading\n\n\x00 naïve \ud800")
        assert log.flush()
    (first,) = read_metrics(tmp_path / "new/run/metrics.jsonl")
    assert first == {"step": 3, "time": first["time"], "train/loss": 2.5, "train/lr": 0.125}
    header, start, scalars, text = read_events(tmp_path / "new" / "run")
    assert header.file_version == "brain.Event:2"
    assert start.session_log.status == SessionLog.START
    assert {v.tag: v.simple_value for v in scalars.summary.value} == {
        "train/loss": 2.5,
        "train/lr": 0.125,
    }
    assert scalars.step == text.step == 3
    assert scalars.wall_time == pytest.approx(first["time"], abs=0.001)
    (value,) = text.summary.value
    assert value.tensor.string_val[0].decode() == "    # no heading\n\n    \x00 naïve ?"


def test_a_record_is_with_the_operating_system_before_any_flush(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log_steps(log, range(3))
    assert lines_by_step(tmp_path) == expected(range(3))
    assert tags_by_step(tmp_path) == expected(range(3), "sample/text_summary")
    log.close()


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with MetricsLog(tmp_path) as log:
        log.scalars(1, {"nan": math.nan, "inf": math.inf, "loss": 3.0})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert (record["nan"], record["inf"], record["loss"]) == (None, None, 3.0)
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["nan"])
    values = {v.tag: v.simple_value for e in read_events(tmp_path) for v in e.summary.value}
    assert math.isnan(values["nan"])
    assert values["inf"] == math.inf


def test_resuming_leaves_no_step_twice(tmp_path: Path) -> None:
    for resume_step, steps in [(None, range(12)), (7, range(8, 15)), (10, range(11, 21))]:
        with MetricsLog(tmp_path, resume_step) as log:
            log_steps(log, steps)
    assert lines_by_step(tmp_path) == expected(range(21))
    assert tags_by_step(tmp_path) == expected(range(21), "sample/text_summary")
    files = event_files(tmp_path)
    assert len(files) == 3
    assert {*tmp_path.iterdir()} == {tmp_path / "metrics.jsonl", *files}


def test_a_run_of_an_older_version_goes_on_in_its_own_folder_of_events(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log_steps(log, range(5))
    (tmp_path / "tensorboard").mkdir()
    for path in event_files(tmp_path):
        path.rename(tmp_path / "tensorboard" / path.name)
    with MetricsLog(tmp_path, 2) as log:
        log_steps(log, range(3, 7))
    assert tags_by_step(tmp_path) == expected(range(7), "sample/text_summary")
    assert (len(event_files(tmp_path / "tensorboard")), event_files(tmp_path)) == (2, [])


@pytest.mark.parametrize("lost_bytes", [1, 5, 30])
@pytest.mark.parametrize("resume_step", [4, 11])
def test_resuming_after_a_crash_in_mid_record(
    tmp_path: Path, lost_bytes: int, resume_step: int
) -> None:
    with MetricsLog(tmp_path) as log:
        log_steps(log, range(13))
    for path in (tmp_path / "metrics.jsonl", *event_files(tmp_path)):
        os.truncate(path, path.stat().st_size - lost_bytes)
    with MetricsLog(tmp_path, resume_step) as log:
        log_steps(log, range(resume_step + 1, 15))
    assert lines_by_step(tmp_path) == expected(range(15))
    assert tags_by_step(tmp_path) == expected(range(15), "sample/text_summary")


def test_a_damaged_event_ends_its_file(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log_steps(log, range(1, 5))
    (path,) = event_files(tmp_path)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # in the data of the last event
    path.write_bytes(data)
    MetricsLog(tmp_path, resume_step=4).close()
    assert tags_by_step(tmp_path) == expected(range(1, 4), "sample/text_summary")


def test_an_entry_that_is_no_event_ends_its_file(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log_steps(log, range(1, 4))
    (path,) = event_files(tmp_path)
    with path.open("ab") as file:
        file.write(_encode_record(b"\xff\xff"))
    with pytest.raises(UserError, match="has metrics of earlier steps"):
        MetricsLog(tmp_path)
    MetricsLog(tmp_path, resume_step=4).close()
    assert tags_by_step(tmp_path) == expected(range(1, 4), "sample/text_summary")


def test_a_symlink_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run") as log:
        log_steps(log, range(3))
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / "rewriting.tmp").symlink_to(tmp_path / "precious")
    MetricsLog(tmp_path / "run", resume_step=1).close()
    assert lines_by_step(tmp_path / "run") == expected(range(2))
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_open_tensorboard_is_told_what_was_removed(tmp_path: Path) -> None:
    MetricsLog(tmp_path).close()
    MetricsLog(tmp_path, resume_step=7).close()
    starts = [e.step for e in read_events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [0, 8]  # the first one TensorBoard takes for no restart


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.hparams({"n_layer": 2})
        log_steps(log, range(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "tra')
    with MetricsLog(tmp_path) as log:
        log.hparams({"n_layer": 3})
        log_steps(log, range(2))
    assert lines_by_step(tmp_path) == expected(range(2))
    hparams = Counter({(0, tag): 1 for tag in HPARAMS_TAGS})
    assert tags_by_step(tmp_path) == expected(range(2), "sample/text_summary") + hparams
    assert len(event_files(tmp_path)) == 1


@pytest.mark.parametrize("gone", [METRICS_FILE, EVENT_FILES])
def test_a_new_run_leaves_the_metrics_of_steps_that_were_taken_alone(
    tmp_path: Path, gone: str
) -> None:
    with MetricsLog(tmp_path) as log:
        log_steps(log, range(3))
    for path in tmp_path.glob(gone):
        path.unlink()
    (left,) = (path for path in tmp_path.rglob("*") if path.is_file())
    before = left.read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint to resume from; move .* another --out-dir"):
        MetricsLog(tmp_path)
    assert left.read_bytes() == before


def test_a_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text("epoch,loss\n1,2.5\n")
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        MetricsLog(tmp_path)
    assert (tmp_path / METRICS_FILE).read_text() == "epoch,loss\n1,2.5\n"


def test_a_number_that_is_not_finite_is_written_without_a_word_of_the_library(
    tmp_path: Path, caplog
) -> None:
    with MetricsLog(tmp_path) as log:
        log.scalars(1, {"train/loss": math.nan})
    assert caplog.records == []


HPARAMS_TAGS = [
    "_hparams_/experiment",
    "_hparams_/session_start_info",
    "_hparams_/session_end_info",
]


def test_hparams_are_written_once_a_run(tmp_path: Path) -> None:
    config = {"n_layer": 12, "bias": False, "out_dir": Path("runs"), "seed": None}
    for resume_step in (None, 3, 5):
        with MetricsLog(tmp_path, resume_step) as log:
            log.hparams(config, metrics=("val/loss",))
            log.hparams(config)
            log_steps(log, range((resume_step or 0) + 1, 8))
    values = [v for e in read_events(tmp_path) for v in e.summary.value if "_hparams_" in v.tag]
    assert [v.tag for v in values] == HPARAMS_TAGS
    start_info = values[1].metadata.plugin_data.content
    for name in (b"n_layer", b"bias", b"out_dir", b"seed"):
        assert name in start_info
    assert b"val/loss" in values[0].metadata.plugin_data.content


def test_restarts_within_a_second_write_files_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([1e9, 1e9, 0.0])  # the third start finds the clock set back
    for step in range(3):
        now = next(clock)
        monkeypatch.setattr(metrics.time, "time", lambda now=now: now)
        with MetricsLog(tmp_path, resume_step=step - 1 if step else None) as log:
            log.scalars(step, {"loss": 1.0})
    assert len(event_files(tmp_path)) == 3
    assert [e.step for e in read_events(tmp_path) if e.summary.value] == [0, 1, 2]


def test_reading_passes_over_what_is_not_a_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\xfe\n[1]\n{"loss": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
