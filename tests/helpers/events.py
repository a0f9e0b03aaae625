"""Reads a run's event files."""

import struct
from collections import Counter
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from jaxgpt.run.metrics_file import events_folder
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
