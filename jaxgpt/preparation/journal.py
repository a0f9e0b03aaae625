"""What a preparation has finished: a JSON line for each unit of work and for each shard.

A journal only grows, so a kill costs its last line at most, and that line's work is done again.
"""

import json
import os
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from jaxgpt.data.manifest import Count
from jaxgpt.errors import UserError
from jaxgpt.files import FormatError, decode_json, read_file


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A unit of work that is done."""

    number: Count
    tokens: dict[str, Count]  # by stream
    documents: Count
    skipped: dict[str, Count]  # by reason
    examples: dict[str, str]  # a file for each reason
    token_count: int | None  # the sum of FineWeb's own column
    bytes: Count


Entry = TypeVar("Entry", bound=msgspec.Struct)


class Journal(Generic[Entry]):
    """The entries of one type in a file, one JSON line each.

    Raises:
        UserError: if a line of the file is anything else.
    """

    def __init__(self, path: Path, kind: type[Entry]):
        self._path = path
        content = read_file(path) if path.exists() else b""
        complete, _, truncated = content.rpartition(b"\n")
        self.entries: list[Entry] = []
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                self.entries.append(decode_json(line, kind))
            except FormatError as error:
                raise UserError(
                    f"{path}: line {number}: {error}; delete {path.parents[1]} and prepare the "
                    "text again"
                ) from None
        if truncated:  # or the next line would be appended to it
            os.truncate(path, len(content) - len(truncated))

    def append(self, entry: Entry) -> None:
        """Add a line; it is on disk when this returns."""
        with self._path.open("ab") as file:
            file.write(json.dumps(msgspec.to_builtins(entry)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)


def nothing_finished(work: Path) -> bool:
    """Whether no unit and no shard is finished, so that the folder's plan can be replaced."""
    journals = (work / "units.jsonl", work / "shards.jsonl")
    return not any(path.exists() and path.stat().st_size for path in journals)
