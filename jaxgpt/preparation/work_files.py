"""The files in `.prepare/`: what a preparation was started with, and what it has finished.

plan.json is written once, before any work. The journals have a JSON line for each finished unit of
work and each shard. They only grow, so a kill costs the last line at most, and that line's work is
done again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from jaxgpt.config.checks import as_flag
from jaxgpt.data.manifest import Count
from jaxgpt.errors import UserError
from jaxgpt.files import FormatError, decode_json, read_file, write_json
from jaxgpt.preparation.documents import ReadOptions
from jaxgpt.preparation.inputs import Input, Unit, work_units

Positive = Annotated[int, msgspec.Meta(ge=1)]
Fraction = Annotated[float, msgspec.Meta(gt=0, lt=1)]
FileNamePart = Annotated[str, msgspec.Meta(pattern=r"^[^/\\]*$")]


class FileSource(msgspec.Struct, frozen=True, tag_field="kind", tag="files"):
    """Files on this machine."""


class HubSource(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="Hub"):
    """A dataset of the Hub at one commit."""

    repo: str
    name: str  # of the configuration, "" for the default one
    split: str
    revision: str
    commit: str = ""  # what the revision was when the preparation began


Source = FileSource | HubSource


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the shards' bytes."""

    prefix: FileNamePart  # of the shards' names
    tokenizer: str
    tokenizer_sha256: str
    options: ReadOptions
    shard_tokens: Positive
    val_tokens: Positive | None  # validation is this many tokens at the start ...
    val_fraction: Fraction | None  # ... or this fraction of the documents, by their hash
    val_at_end: bool = False  # ... or that fraction of the tokens, at the end of each unit
    val: str | None = None  # ... or inputs of its own, which this names
    unit_bytes: Positive

    @property
    def streams(self) -> tuple[str, ...]:
        """What workers write: a stream for each split, or one that the parent cuts into splits."""
        return ("all",) if self.val is None and self.val_fraction is None else ("train", "val")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The source, the settings, and the inputs in the order of their tokens.

    Inputs that a later command adds form a round of their own, which begins a new shard: finished
    shards stay as they are.
    """

    source: Source
    settings: Settings
    rounds: list[list[Input]] = field(default_factory=list)

    @property
    def inputs(self) -> list[Input]:
        """The inputs of all rounds, in order."""
        return [item for inputs in self.rounds for item in inputs]

    def units(self) -> list[Unit]:
        """The units of work, in order."""
        return [unit for units in self._rounds_of_units() for unit in units]

    def round_ends(self) -> list[int]:
        """After how many units each round ends."""
        return [*accumulate(len(units) for units in self._rounds_of_units())]

    def _rounds_of_units(self) -> list[list[Unit]]:
        return [work_units(inputs, self.settings.unit_bytes) for inputs in self.rounds]

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, msgspec.to_builtins(self))

    @classmethod
    def load(cls, path: Path) -> "Plan | None":
        """The plan of a folder, None if there is none; raises UserError."""
        if not path.exists():
            return None
        try:
            return decode_json(read_file(path), cls)
        except FormatError as error:
            raise UserError(
                f"{path}: {error}; another version of jaxgpt wrote it, or it is corrupt: prepare "
                "into another folder with --out, or delete this one"
            ) from None


def with_inputs(plan: Plan, inputs: Sequence[Input], out: Path) -> Plan:
    """`plan`, with a new round for those `inputs` that it does not have yet.

    Raises UserError if an input of the plan is missing from `inputs` or has changed.
    """
    named = {item.path: item for item in inputs}
    known = {item.path: item for item in plan.inputs}
    for path, item in known.items():
        if path not in named:
            raise UserError(
                f"{out}: already contains {item.name}, which this command does not name ({path}); "
                "name it too to add to the folder, or choose another folder with --out"
            )
        if named[path] != item:
            raise UserError(
                f"{path}: has changed since {out} was started (it had {item.size:,} bytes and "
                f"checksum {item.check}, and now has {named[path].size:,} and "
                f"{named[path].check}); restore the file, or choose another folder with --out"
            )
    new = [item for item in inputs if item.path not in known]
    if not new:
        return plan
    return Plan(source=plan.source, settings=plan.settings, rounds=[*plan.rounds, new])


def refuse_differences(plan: Plan, source: Source, settings: Settings, out: Path) -> None:
    """Raises UserError, naming every difference, if `out` was started with something else."""
    was, now = _flags_of(plan.source, plan.settings), _flags_of(source, settings)
    if was["tokenizer_sha256"] == now["tokenizer_sha256"]:
        del now["tokenizer"]  # two names for the same, as tok and tok/
    elif was["tokenizer"] != now["tokenizer"]:
        del now["tokenizer_sha256"]
    differences = [
        f"{_flag_name(name)} {was.get(name)}, not {now[name]}"
        for name in now
        if was.get(name) != now[name]
    ]
    if differences:
        raise UserError(
            f"{out}: was started with {', '.join(differences)}; a folder has one source and one "
            "set of flags: choose another folder with --out"
        )


def _flags_of(source: Source, settings: Settings) -> dict[str, Any]:
    flat = {**msgspec.to_builtins(source), **msgspec.to_builtins(settings)}
    # A preparation keeps its first commit, unit sizes change no token, and options are listed one
    # by one.
    hidden = {"commit", "options", "unit_bytes", "prefix", "val_at_end", "ids"}
    shown = {k: v for k, v in {**flat, **flat["options"]}.items() if k not in hidden}
    return {k: "unset" if v in (None, "") else v for k, v in shown.items()}


def _flag_name(name: str) -> str:
    names = {"kind": "source", "repo": "dataset", "tokenizer_sha256": "a tokenizer of SHA-256"}
    return names.get(name, as_flag(name))


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
