"""Finds the input files, and groups them into units of work.

Units depend on the paths and sizes of the inputs only, not on contents or the number of workers.
So "unit 12" is the same in a killed run and in the run that resumes it.
"""

import glob
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxgpt.data.manifest import WORK_FOLDER, Count, Split
from jaxgpt.data.shards import token_files
from jaxgpt.errors import UserError, first_line
from jaxgpt.files import user_path
from jaxgpt.preparation.archives import archive_of, is_archive, members

Kind = Literal["parquet", "jsonl", "csv", "text", "arrow"]

SUFFIXES: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".txt": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")  # of all but parquet
READABLE = (
    ".parquet, .jsonl, .csv, .txt, .md, all but the first also as .gz, .zst, .xz or .bz2; or .zip "
    "files of these"
)

# Bytes of text per byte of file. FineWeb's sample-10BT: 10.37e9 tokens x 4.6 bytes in 30.6 GB of
# parquet; gzip and zstd compress English to a third.
TEXT_IN_PARQUET, TEXT_IN_COMPRESSED = 1.56, 3.0
TEXT_BYTES_PER_TOKEN = 4.6  # GPT-2's BPE on FineWeb

EDGE = 1 << 16  # bytes at each end of a file that its checksum covers


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file, local or on the Hub, or a folder written by save_to_disk."""

    path: str
    size: Count  # bytes
    kind: Kind
    check: str  # a checksum, to notice that the file has changed
    rows: Count = 0  # of a save_to_disk folder
    split: Split = "train"  # "val" only where --val names the validation text

    @property
    def name(self) -> str:
        """Its file name, for messages and the manifest."""
        return Path(self.path).name

    @property
    def text_bytes(self) -> int:
        """The bytes of text in it, estimated from its size."""
        if self.kind == "parquet":
            return int(self.size * TEXT_IN_PARQUET)
        return int(self.size * (TEXT_IN_COMPRESSED if self.is_compressed else 1))

    @property
    def is_compressed(self) -> bool:
        return self.kind not in ("parquet", "arrow") and self.path.lower().endswith(COMPRESSED)

    @property
    def divisible(self) -> bool:
        """Whether a reader can start in the middle."""
        has_parts = self.kind in ("parquet", "arrow")
        has_parts |= self.kind == "jsonl" and not self.is_compressed
        return has_parts and not archive_of(self.path)


class Slice(NamedTuple):
    """Part `part` of the `parts` equal parts of an input, which can be read at `path`."""

    input: Input
    path: str
    part: int
    parts: int

    @property
    def size(self) -> int:
        """Its share of the input's bytes."""
        start, stop = self.share_of(self.input.size)
        return stop - start

    def share_of(self, n: int) -> tuple[int, int]:
        """The range [start, stop) of this part in an input of `n` bytes, rows or row groups."""
        return n * self.part // self.parts, n * (self.part + 1) // self.parts


Unit = tuple[Slice, ...]


def work_units(inputs: Iterable[Input], unit_bytes: int) -> list[Unit]:
    """Consecutive inputs in groups of up to `unit_bytes` of text; larger inputs are divided."""
    units: list[Unit] = []
    group: list[Slice] = []
    grouped = 0
    for item in inputs:
        parts = max(1, -(-item.text_bytes // unit_bytes)) if item.divisible else 1
        if group and (parts > 1 or grouped + item.text_bytes > unit_bytes):
            units.append(tuple(group))
            group, grouped = [], 0
        slices = [Slice(item, item.path, part, parts) for part in range(parts)]
        if parts > 1:
            units += [(one,) for one in slices]
        else:
            group += slices
            grouped += item.text_bytes
    return [*units, tuple(group)] if group else units


def find_inputs(arguments: Sequence[str]) -> list[Input]:
    """The files that paths, patterns and folders name, sorted and without duplicates.

    Raises UserError for a path that does not exist or is not readable text.
    """
    found: dict[str, Input] = {}
    for argument in arguments:
        path = user_path(argument, "input")
        if is_saved_dataset(path):
            inputs = [saved_dataset(path)]
        else:
            inputs = [item for file in _files_of(argument) for item in _local_inputs(file)]
        found |= {item.path: item for item in inputs}
    return [found[path] for path in sorted(found)]


def kind_of(path: str) -> Kind | None:
    """The format of a file by its name, None if it is unknown."""
    name = path.lower()
    bare = os.path.splitext(name)[0] if name.endswith(COMPRESSED) else name
    kind = SUFFIXES.get(os.path.splitext(bare)[1])
    return None if kind == "parquet" and bare != name else kind


def is_readable(path: str) -> bool:
    """Whether a file has a format that is read, or is an archive of such, by its name."""
    return is_archive(path) or kind_of(path) is not None


def is_saved_dataset(path: Path) -> bool:
    """Whether datasets' save_to_disk wrote this folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def has_splits(path: Path) -> bool:
    """Whether a DatasetDict's save_to_disk wrote this folder."""
    return (path / "dataset_dict.json").is_file()


def splits_of(path: Path) -> list[str]:
    """The names of a DatasetDict's splits."""
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir())


def saved_dataset(path: Path) -> Input:
    """A save_to_disk folder, or the split 'train' of one with several; raises UserError."""
    if has_splits(path):
        if not (path / "train" / "state.json").is_file():
            names = ", ".join(splits_of(path))
            raise UserError(f"{path}: has no split 'train'; name one of its folders ({names})")
        path = path / "train"
    from datasets import load_from_disk

    try:
        state = json.loads((path / "state.json").read_bytes())
        # It cannot load what it has saved without rows.
        rows = 0 if state.get("_data_files") == [] else len(load_from_disk(str(path)))
    except Exception as error:  # datasets wraps pyarrow's and its own
        raise UserError(
            f"{path}: cannot be read as a saved dataset ({first_line(error)}); save it again"
        ) from None
    files = sorted(path.glob("*.arrow"))
    return Input(
        path=str(path.resolve()),
        size=sum(file.stat().st_size for file in files),
        kind="arrow",
        check=f"{zlib.crc32(''.join(_edges(file) for file in files).encode()):08x}",
        rows=rows,
    )


def _files_of(argument: str) -> list[Path]:
    path = user_path(argument, "input")
    if path.is_dir():
        return _files_in(path)
    if path.exists():
        files = [path]
    elif glob.has_magic(argument):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(f"{argument}: no file matches; give a path to {READABLE}")
    else:
        raise UserError(
            f"{argument}: no such file or folder; name text ({READABLE}), a folder of it, or a "
            "dataset of the Hub as fineweb, fineweb-edu or owner/name"
        )
    for file in files:
        if not is_readable(str(file)) or not file.is_file():  # a pipe can be read only once
            raise UserError(_unreadable_error(file))
    return [_absolute(file) for file in files]


def _absolute(path: Path) -> Path:
    """The target of a link, or the link itself if only its own name has a known suffix.

    Links in the Hub's cache are such: their targets are named by hash.
    """
    target = path.resolve()
    return target if is_readable(target.name) else path.parent.resolve() / path.name


def _files_in(folder: Path) -> list[Path]:
    if token_files(folder.glob("*")):
        raise UserError(
            f"{folder}: already contains tokens; train on them with python -m jaxgpt.train "
            f"--data-dir {folder}, or inspect them with python -m jaxgpt.prepare --inspect {folder}"
        )
    files = [_absolute(path) for path in _texts_under(folder)]
    if not files:
        raise UserError(f"{folder}: contains no text ({READABLE})")
    return files


def _texts_under(folder: Path) -> Iterator[Path]:
    """Files with a known suffix, except in hidden folders and in folders of tokens.

    Raises UserError for a link whose target is missing.
    """
    walked = set[tuple[int, int]]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        stat = os.stat(parent)
        if (stat.st_dev, stat.st_ino) in walked:  # by another link, perhaps of an endless loop
            folders.clear()
            continue
        walked.add((stat.st_dev, stat.st_ino))
        here = [Path(parent, name) for name in folders if not name.startswith(".")]
        folders[:] = [
            path.name
            for path in here
            if not (path / WORK_FOLDER).is_dir() and not token_files(path.glob("*"))
        ]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        texts = [path for path in paths if is_readable(path.name)]
        if missing := [path for path in texts if not path.exists()]:
            raise UserError(f"{missing[0]}: its target is missing; restore it, or delete this link")
        yield from (path for path in texts if path.is_file())


def _unreadable_error(path: Path) -> str:
    if token_files([path]):
        return (
            f"{path}: already contains tokens; train on its folder with python -m jaxgpt.train "
            f"--data-dir {path.parent}"
        )
    return f"{path}: is not a readable text file; convert it to one of {READABLE}"


def _local_inputs(path: Path) -> list[Input]:
    """A file, or what can be read in an archive; raises UserError."""
    try:
        if is_archive(path.name):
            return _members_of(path)
        kind = kind_of(path.name)
        assert kind is not None
        return [Input(path=str(path), size=path.stat().st_size, kind=kind, check=_edges(path))]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from None


def _members_of(archive: Path) -> list[Input]:
    inputs = [
        Input(path=path, size=info.file_size, kind=kind, check=f"{info.CRC:08x}")
        for path, info in members(str(archive)).items()
        if (kind := kind_of(path)) and "/." not in path[len(str(archive)) :]  # as in a folder
    ]
    if not inputs:
        raise UserError(f"{archive}: contains no text ({READABLE})")
    return inputs


def _edges(path: Path) -> str:
    """CRC-32 of a file's first and last 64 KB, in hexadecimal."""
    with path.open("rb") as file:
        head = file.read(EDGE)
        file.seek(max(EDGE, path.stat().st_size - EDGE))
        return f"{zlib.crc32(file.read(EDGE), zlib.crc32(head)):08x}"
