"""Steps that a test logs, and what the log's two files have of them."""

import struct
from collections import Counter
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from jaxgpt.run.metrics import MetricsLog
from jaxgpt.run.metrics_file import events_folder, read_metrics
from jaxgpt.run.tensorboard_events import event_files


def read_events(out_dir: Path) -> list[Event]:
    """Every event of every file, in order; fails at the first damaged byte."""
    events = []
    for path in event_files(events_folder(out_dir)):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            record, rest = data[12 : 12 + length], data[12 + length :]
            sums = struct.unpack_from("<I", data, 8) + struct.unpack_from("<I", rest)
            assert sums == (masked_crc32c(data[:8]), masked_crc32c(record))
            events.append(Event.FromString(record))
            data = rest[4:]
    return events


def tags_by_step(out_dir: Path) -> Counter[tuple[int, str]]:
    return Counter((e.step, v.tag) for e in read_events(out_dir) for v in e.summary.value)


def lines_by_step(out_dir: Path) -> Counter[tuple[int, str]]:
    """How often metrics.jsonl has each tag of each step."""
    records = read_metrics(out_dir / "metrics.jsonl")
    return Counter((r["step"], tag) for r in records for tag in r.keys() - {"step", "time"})


def log_steps(log: MetricsLog, steps: range) -> None:
    """Log two scalars at each step; a third, and a text, at every fifth."""
    for step in steps:
        log.scalars(step, {"train/loss": 11.0 - step, "train/lr": 1e-3})
        if step % 5 == 0:
            log.scalars(step, {"val/loss": 10.5 - step})
            log.text(step, "sample", f"text of step {step}")


def expected(steps: range, *text_tags: str) -> Counter[tuple[int, str]]:
    """What `lines_by_step` finds after `log_steps`."""
    tags = [(step, tag) for step in steps for tag in ("train/loss", "train/lr")]
    tags += [(s, tag) for s in steps if s % 5 == 0 for tag in ("val/loss", *text_tags)]
    return Counter(tags)
