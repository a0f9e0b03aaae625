"""What a folder under preparation remembers: its plan, and a line for each thing that is done.

Everything lies in `.prepare/` beside the shards. The plan is written once, before any work; a
journal only grows, so a kill costs its last line at most, and that line's work is done again.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.files import write_json
from jaxgpt.preparation.documents import ReadOptions
from jaxgpt.preparation.inputs import Input, Unit, share_of_rank, work_units


def nothing_done(work: Path) -> bool:
    """Whether a folder's plan can still be replaced: no unit and no shard came of it."""
    journals = (work / "units.jsonl", work / "shards.jsonl")
    return not any(path.exists() and path.stat().st_size for path in journals)


SHARD = ("file", "split", "tokens", "documents", "sha256")  # what is noted of one


class Journal:
    """JSON objects in a file, a line each, all with the same `names`. Raises UserError."""

    def __init__(self, path: Path, names: Iterable[str]):
        self._path = path
        text = path.read_bytes() if path.exists() else b""
        whole, _, torn = text.rpartition(b"\n")
        try:
            self.entries: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
            sound = all(set(entry) == set(names) for entry in self.entries)
        except (ValueError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise UserError(
                f"{path}: is damaged; delete {path.parents[1]} and prepare the text again"
            )
        if torn:  # or the next line would be joined to it
            os.truncate(path, len(text) - len(torn))

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns."""
        with self._path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides which bytes a folder gets; all of it is in the plan."""

    prefix: str  # of the shards' names
    tokenizer: str
    tokenizer_sha256: str
    options: ReadOptions
    shard_tokens: int
    val_tokens: int | None  # the first so many tokens are 'val' ...
    val_fraction: float | None  # ... or this share of the documents, by their hash
    unit_bytes: int
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The source, the settings, and the inputs in the order of their tokens.

    Inputs that a later command adds form a round of their own, which begins a new shard: what was
    finished stays as it is.
    """

    source: dict[str, str]
    settings: Settings
    rounds: list[list[Input]] = field(default_factory=list)

    def units(self) -> list[Unit]:
        """The work of this rank, in order."""
        return [unit for units in self._rounds_of_units() for unit in units]

    def round_ends(self) -> list[int]:
        """After how many units each round ends."""
        ends, total = [], 0
        for units in self._rounds_of_units():
            total += len(units)
            ends.append(total)
        return ends

    def _rounds_of_units(self) -> list[list[Unit]]:
        s = self.settings
        return [
            share_of_rank(work_units(inputs, s.unit_bytes), s.rank, s.world_size)
            for inputs in self.rounds
        ]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Plan | None":
        """The plan of a folder; None where there is none. Raises UserError."""
        if not path.exists():
            return None
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            settings = {**raw["settings"], "options": ReadOptions(**raw["settings"]["options"])}
            return cls(
                source=raw["source"],
                settings=Settings(**settings),
                rounds=[[Input(**item) for item in inputs] for inputs in raw["rounds"]],
            )
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}: was not written by this version of jaxgpt, or is damaged; prepare into "
                "another folder with --out, or delete this one"
            ) from None


def with_inputs(plan: Plan, inputs: Sequence[Input], out: Path) -> Plan:
    """`plan`, with a round for the inputs that it does not have yet.

    Raises UserError if an input of the plan is missing from `inputs` or is no longer what it was.
    """
    named = {item.path: item for item in inputs}
    known = {item.path: item for round in plan.rounds for item in round}
    for path, item in known.items():
        if path not in named:
            raise UserError(
                f"{out}: has {item.name} in it already, which this command does not name "
                f"({path}); name it too to add to the folder, or start another with --out"
            )
        if named[path] != item:
            raise UserError(
                f"{path}: is not what {out} was begun with (it was {item.size:,} bytes, checksum "
                f"{item.check}, and is {named[path].size:,}, {named[path].check}); give the file "
                "back, or start another folder with --out"
            )
    new = [item for item in inputs if item.path not in known]
    if not new:
        return plan
    return Plan(source=plan.source, settings=plan.settings, rounds=[*plan.rounds, new])


def check_same(plan: Plan, source: dict[str, str], settings: Settings, out: Path) -> None:
    """Raises UserError, naming every difference, if `out` was begun from something else."""
    was, now = _flat(plan.source, plan.settings), _flat(source, settings)
    differing = [name for name in now if was.get(name) != now[name]]
    if differing:
        told = ", ".join(f"{_flag(name)} {was.get(name)}, not {now[name]}" for name in differing)
        raise UserError(
            f"{out}: was begun with {told}; a folder holds one source prepared in one way: give "
            "this one another with --out"
        )


def _flat(source: dict[str, str], settings: Settings) -> dict[str, Any]:
    flat = asdict(settings)
    # A hash in place of a name helps nobody; the size of a unit changes no token.
    hidden = {"options", "unit_bytes", "prefix"}
    return {k: v for k, v in {**source, **flat, **flat["options"]}.items() if k not in hidden}


def _flag(name: str) -> str:
    return {"kind": "source", "repo": "data set"}.get(name, f"--{name.replace('_', '-')}")
