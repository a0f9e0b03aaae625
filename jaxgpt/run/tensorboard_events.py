"""TensorBoard's event files: their names, and the events in them (TFRecord).

tensorboardX's protocol buffers are used, its SummaryWriter is not: an error ends its thread
silently, and ten events later `add_scalar` blocks.
"""

import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from jaxgpt.run.metrics_file import EVENT_FILES


def event_files(folder: Path) -> list[Path]:
    """A run's event files in the order written."""
    return sorted(folder.glob(EVENT_FILES))


def next_file_name(existing: list[Path]) -> str:
    """A name that sorts after `existing`, even within a second or after the clock was set back."""
    stamps = [path.name.split(".")[3] for path in existing]
    latest = max((int(stamp) for stamp in stamps if stamp.isdecimal()), default=0)
    return f"events.out.tfevents.{max(int(time.time()), latest + 1):010d}.{socket.gethostname()}"


def encode_event(event: Event) -> bytes:
    """An event as an entry of the file."""
    return _encode_record(event.SerializeToString())


def decode_events(file: bytes) -> list[tuple[bytes, Event]]:
    """(entry, event) of a file, up to its end or to the first entry that is damaged."""
    events = []
    start = 0
    while start + 16 <= len(file):
        (length,) = struct.unpack_from("<Q", file, start)
        record = file[start : start + 16 + length]
        data = record[12:-4]
        if record != _encode_record(data):
            break
        try:
            events.append((record, Event.FromString(data)))
        except DecodeError:
            break
        start += len(record)
    return events


def merge_summaries(parts: Iterable[Summary]) -> Summary:
    """One summary with the values of all `parts`."""
    return Summary(value=[value for part in parts for value in part.value])


def _encode_record(data: bytes) -> bytes:
    """Length, its checksum, data, its checksum."""
    length = struct.pack("<Q", len(data))
    length_crc, data_crc = (struct.pack("<I", masked_crc32c(x)) for x in (length, data))
    return length + length_crc + data + data_crc
