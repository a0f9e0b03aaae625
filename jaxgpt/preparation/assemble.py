"""Cuts shards from the parts (`tokenize.py`), in the order of the inputs.

A shard is written once all its tokens exist, atomically, and never changes. Parts whose tokens are
all in shards are deleted.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxgpt.data.manifest import ShardEntry, Split
from jaxgpt.data.shards import TokenStream
from jaxgpt.data.token_file import UINT16, TokenFile, inspect_file, write_pieces
from jaxgpt.errors import UserError
from jaxgpt.files import sha256_of
from jaxgpt.preparation.tokenize import iterate_tokens, part_path
from jaxgpt.preparation.work_files import Journal, Plan, Record


@dataclass(frozen=True)
class Output:
    """A split: tokens [start, stop) of a stream, to its end if `stop` is None."""

    split: Split
    stream: str
    start: int
    stop: int | None


def outputs_of(plan: Plan, limit_tokens: int | None) -> list[Output]:
    """The splits of a plan; `limit_tokens` limits 'train' only."""
    s = plan.settings
    if "val" in s.streams:
        return [Output("val", "val", 0, None), Output("train", "train", 0, limit_tokens)]
    first = s.val_tokens or 0
    stop = None if limit_tokens is None else first + limit_tokens
    train = Output("train", "all", first, stop)
    return [Output("val", "all", 0, first), train] if first else [train]


class Assembler:
    """The state of a folder: which units are done, which shards are written, what comes next."""

    def __init__(
        self,
        out: Path,
        work: Path,
        plan: Plan,
        limit_tokens: int | None,
        eot: int,
        dtype: np.dtype = UINT16,
    ):
        self._out, self._parts, self._plan = out, work / "parts", plan
        self._eot, self.dtype = eot, dtype
        self._parts.mkdir(exist_ok=True)
        self._units = Journal(work / "units.jsonl", Record)
        self._shards = Journal(work / "shards.jsonl", ShardEntry)
        self._outputs = outputs_of(plan, limit_tokens)
        self._round_ends = plan.round_ends()
        self._n_units = self._round_ends[-1] if self._round_ends else 0
        self._records = {record.number: record for record in self._units.entries}
        # By stream: where each unit's tokens end, up to the first unfinished unit.
        self._ends: dict[str, list[int]] = {output.stream: [0] for output in self._outputs}
        self._refuse_other_streams()
        self._tokens_in, self._shards_in = Counter[str](), Counter[str]()  # by split
        for shard in self.shards:
            self._add_to_totals(shard)
        self._remove_leftovers()
        self._extend_ends()
        self._forget_lost_parts()
        self._adopt_unrecorded_shards()

    @property
    def shards(self) -> list[ShardEntry]:
        """The finished shards, in order."""
        return self._shards.entries

    @property
    def tokens_done(self) -> int:
        """The tokens in finished shards."""
        return self._tokens_in.total()

    @property
    def finished(self) -> bool:
        """Whether all shards are written."""
        return all(self._is_finished(output) for output in self._outputs)

    def pending_units(self) -> list[int]:
        """The unfinished units, in order; none once the limit is reached."""
        if self._last_needed() is not None:
            return []
        return [k for k in range(self._n_units) if k not in self._records]

    def used_records(self) -> list[Record]:
        """The records of the units whose tokens are in the shards."""
        last = self._last_needed()
        return [self._records[k] for k in range(self._n_units if last is None else last + 1)]

    def add(self, record: Record) -> None:
        """Record a unit whose parts are on disk."""
        self._units.append(record)
        self._records[record.number] = record
        self._extend_ends()

    def write_complete_shards(self) -> None:
        """Write every shard whose tokens are all there."""
        for output in self._outputs:
            while stop := self._next_shard_end(output):
                self._write_shard(output, self._position(output), stop)
                self._delete_used_parts()

    def delete_parts(self) -> None:
        """Delete the parts that remain when all shards are written."""
        for path in self._parts.iterdir():
            path.unlink()

    def remove_unfinished_parts(self, number: int) -> None:
        """Delete what a worker that died has written of a unit."""
        for path in self._parts.glob(f"{number:06d}.*.tmp"):
            path.unlink(missing_ok=True)

    def _refuse_other_streams(self) -> None:
        for record in self._units.entries:
            if record.tokens.keys() != self._ends.keys():
                raise UserError(
                    f"{self._out}: its journal has tokens of {', '.join(record.tokens)} in unit "
                    f"{record.number}, expected {', '.join(self._ends)}; delete {self._out} and "
                    "prepare the text again"
                )

    def _extend_ends(self) -> None:
        for stream, ends in self._ends.items():
            while (record := self._records.get(len(ends) - 1)) is not None:
                ends.append(ends[-1] + record.tokens[stream])

    def _position(self, output: Output) -> int:
        """Where the next shard of a split begins in its stream."""
        return output.start + self._tokens_in[output.split]

    def _last_needed(self) -> int | None:
        """The unit in which the limit is reached, None if it is not reached yet."""
        train = self._outputs[-1]
        ends = self._ends[train.stream]
        if train.stop is None:
            return None
        stop = max(train.stop, self._position(train))  # an earlier run may have had no limit
        return max(0, bisect_left(ends, stop) - 1) if ends[-1] >= stop else None

    def _split_end(self, output: Output) -> int | None:
        """Where a split ends, None if that is not known yet."""
        ends, last, end = self._ends[output.stream], self._last_needed(), output.stop
        if end is None and last is not None:
            end = ends[last + 1]
        if len(ends) <= self._n_units:
            return end
        return ends[-1] if end is None else min(end, ends[-1])

    def _next_shard_end(self, output: Output) -> int | None:
        """Where the next shard ends, None if it cannot be written yet."""
        position, ends = self._position(output), self._ends[output.stream]
        end = self._split_end(output)
        borders = [ends[k] for k in self._round_ends if k < len(ends)]
        borders += [position + self._plan.settings.shard_tokens, end or 0]
        stop = min(border for border in borders if border > position)
        return stop if stop <= min(ends[-1], ends[-1] if end is None else end) else None

    def _is_finished(self, output: Output) -> bool:
        end = self._split_end(output)
        return end is not None and self._position(output) >= end

    def _next_name(self, output: Output) -> str:
        s = self._plan.settings
        # as in llm.c: val is 0, train begins at 1
        number = self._shards_in[output.split] + (output.split == "train")
        return f"{s.prefix}_{output.split}_{number:06d}.bin"

    def _write_shard(self, output: Output, start: int, stop: int) -> None:
        documents = 0

        def pieces() -> Iterator[np.ndarray]:
            nonlocal documents
            for piece in self._tokens(output.stream, start, stop):
                documents += int(np.count_nonzero(piece == self._eot))
                yield piece

        name = self._next_name(output)
        sha256 = write_pieces(self._out / name, stop - start, pieces(), self.dtype)
        self._record_shard(name, output, stop - start, documents, sha256)

    def _record_shard(
        self, name: str, output: Output, tokens: int, documents: int, sha256: str
    ) -> None:
        shard = ShardEntry(
            file=name, split=output.split, tokens=tokens, documents=documents, sha256=sha256
        )
        self._shards.append(shard)
        self._add_to_totals(shard)

    def _add_to_totals(self, shard: ShardEntry) -> None:
        self._tokens_in[shard.split] += shard.tokens
        self._shards_in[shard.split] += 1

    def _tokens(self, stream: str, start: int, stop: int) -> Iterator[np.ndarray]:
        ends = self._ends[stream]
        unit = bisect_right(ends, start) - 1
        while start < stop:
            first, last = ends[unit : unit + 2]
            end = min(stop, last)
            path = part_path(self._parts, unit, stream)
            yield from iterate_tokens(path, start - first, end - first, self.dtype)
            unit, start = unit + 1, end

    def _adopt_unrecorded_shards(self) -> None:
        """Record a shard that a killed run wrote but did not record.

        Its tokens are still in the parts, which are deleted after recording. Raises UserError for
        a file with other tokens.
        """
        for output in self._outputs:
            path = self._out / self._next_name(output)
            if path.exists():
                file = inspect_file(path)
                documents = self._compare(file, output)
                if documents is None:
                    raise UserError(
                        f"{path}: was not written by this command; move it to another folder, or "
                        "choose another one with --out"
                    )
                self._record_shard(path.name, output, file.length, documents, sha256_of(path))

    def _compare(self, file: TokenFile, output: Output) -> int | None:
        """The documents that begin in a file, None if it does not have the split's next tokens."""
        tokens, start = TokenStream([file], str(file.path)), self._position(output)
        if start + file.length > self._ends[output.stream][-1]:
            return None
        compared = documents = 0
        for piece in self._tokens(output.stream, start, start + file.length):
            if not np.array_equal(tokens.window(compared, len(piece)), piece):
                return None
            compared += len(piece)
            documents += int(np.count_nonzero(piece == self._eot))
        return documents

    def _remove_leftovers(self) -> None:
        for path in [*self._parts.glob("*.tmp"), *self._out.glob("*.bin.tmp")]:
            path.unlink(missing_ok=True)

    def _forget_lost_parts(self) -> None:
        """Forget units whose tokens are neither in a shard nor on disk, to process them again."""
        for number, record in sorted(self._records.items()):
            for stream, ends in self._ends.items():
                # No shard has tokens from beyond a gap.
                if number + 1 < len(ends) and self._is_used(stream, ends[number + 1]):
                    continue
                path = part_path(self._parts, number, stream)
                size = self.dtype.itemsize * record.tokens[stream]
                if not path.exists() or path.stat().st_size != size:
                    self._records.pop(number, None)
        self._ends = {stream: [0] for stream in self._ends}
        self._extend_ends()

    def _is_used(self, stream: str, end: int) -> bool:
        """Whether all tokens before `end` are in shards."""
        outputs = [output for output in self._outputs if output.stream == stream]
        return all(
            self._position(o) >= end or (o.split == "val" and o.stop == self._position(o))
            for o in outputs
        )

    def _delete_used_parts(self) -> None:
        for path in self._parts.glob("??????.*"):
            number, _, stream = path.name.partition(".")
            ends = self._ends.get(stream, [])  # none of a part that is being written
            if int(number) + 1 < len(ends) and self._is_used(stream, ends[int(number) + 1]):
                path.unlink()
