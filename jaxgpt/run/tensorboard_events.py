"""TensorBoard's event files: what they are called, and the records in them (TFRecord)."""

import socket
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


def event_files(folder: Path) -> list[Path]:
    """A run's event files in the order written."""
    return sorted(folder.glob("events.out.tfevents.*"))


def next_name(existing: list[Path]) -> str:
    """A name that sorts after `existing`, be it within a second or with the clock set back."""
    stamps = [path.name.split(".")[3] for path in existing]
    latest = max((int(stamp) for stamp in stamps if stamp.isdecimal()), default=0)
    return f"events.out.tfevents.{max(int(time.time()), latest + 1):010d}.{socket.gethostname()}"


def as_record(data: bytes) -> bytes:
    """One entry of a TFRecord file: length, its checksum, data, its checksum."""
    length = struct.pack("<Q", len(data))
    sum_of_length, sum_of_data = (struct.pack("<I", masked_crc32c(x)) for x in (length, data))
    return length + sum_of_length + data + sum_of_data


def whole_records(file: bytes) -> Iterator[bytes]:
    """The entries of a TFRecord file up to its end or to the first that is not whole."""
    start = 0
    while start + 16 <= len(file):
        (length,) = struct.unpack_from("<Q", file, start)
        record = as_record(file[start + 12 : start + 12 + length])
        if file[start : start + 16 + length] != record:
            return
        yield record[12:-4]
        start += len(record)


def merged(parts: Iterable[Summary]) -> Summary:
    """One summary of what several hold."""
    return Summary(value=[value for part in parts for value in part.value])
