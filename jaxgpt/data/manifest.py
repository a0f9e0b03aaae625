"""manifest.json: a record of the shards in a folder, and checks of the shards against it.

`jaxgpt.prepare` writes it last, so a folder that has one is complete. Folders without one (llm.c's,
modded-nanogpt's, nanoGPT's) can be trained on too, but there is nothing to check their files
against.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from jaxgpt.data.shards import TokenStream, token_files
from jaxgpt.data.token_file import HEADER_BYTES, PREPARE, DataError, TokenFile, refuse
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.files import FormatError, decode_json, read_file, sha256_of, write_json

MANIFEST = "manifest.json"
WORK_FOLDER = ".prepare"  # where an unfinished preparation keeps its files
VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=0)]
Split = Literal["train", "val"]


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True, order=True, forbid_unknown_fields=True):
    """One shard, in the manifest and in the journal of a preparation; sorted by file name."""

    file: str
    split: Split
    tokens: Count
    documents: Count  # that begin in this shard
    sha256: str

    def __post_init__(self) -> None:
        if PurePath(self.file).name != self.file or not self.file.endswith(".bin"):
            raise ValueError(f"Expected the name of a .bin file in this folder, got {self.file!r}")


class TokenizerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer that made the shards."""

    name: str
    sha256: str
    n_vocab: Count
    eot: Count | None = None


class Validation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the validation split was chosen.

    The first `tokens`, a `fraction` of the documents, or `files` of its own.
    """

    rule: str = ""
    tokens: Count | None = None
    fraction: float | None = None
    files: list[str] = []


class SplitTotals(msgspec.Struct, frozen=True):
    """The sums over a split's shards."""

    tokens: Count
    documents: Count


class Splits(msgspec.Struct, frozen=True):
    """Both splits."""

    train: SplitTotals
    val: SplitTotals

    def items(self) -> list[tuple[Split, SplitTotals]]:
        """(name, totals) of each."""
        return [("train", self.train), ("val", self.val)]


class Documents(msgspec.Struct, frozen=True, kw_only=True):
    """How many documents were used, and how many were skipped for each reason."""

    used: Count
    skipped: dict[str, Count]
    skipped_for_example: dict[str, str]  # the first file for each reason


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    """The sum of FineWeb's token_count column, and ours."""

    source_says: int
    tokens_minus_documents: int
    equal: bool


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of manifest.json; only prepared text has `documents` and `token_count`."""

    version: int = VERSION
    jaxgpt: str = ""  # the version that wrote it
    source: dict[str, Any]
    tokenizer: TokenizerEntry
    eot: str = "before each document"
    dtype: Literal["uint16", "uint32"] = "uint16"
    validation: Validation
    shard_tokens: Count | None = None
    splits: Splits
    shards: list[ShardEntry]
    documents: Documents | None = None
    token_count: TokenCount | None = None

    def __post_init__(self) -> None:
        for name, count in Counter(shard.file for shard in self.shards).items():
            if count > 1:
                raise ValueError(f"Expected each shard once, got {name!r} {count} times")

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, msgspec.to_builtins(self))


class _Version(msgspec.Struct):
    version: int


def load_manifest(data_dir: Path) -> Manifest | None:
    """The manifest of a folder, None if there is none.

    Raises:
        DataError: if it cannot be read, has another version, or has fields of another type.
    """
    path, remedy = data_dir / MANIFEST, _remedy(data_dir)
    try:
        content = read_file(path)
        version = decode_json(content, _Version).version
        if version == VERSION:
            return decode_json(content, Manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); make it readable, or {remedy}"
        ) from None
    except FormatError as error:
        raise DataError(f"{path}: {error}; {remedy}") from None
    raise DataError(
        f"{path}: has version {version}, and this jaxgpt reads version {VERSION}; update jaxgpt, "
        "or prepare the text again"
    )


def check_manifest(data_dir: Path, tokenizer: Tokenizer) -> str | None:
    """The fingerprint of a folder's data, None without a manifest.

    Raises:
        DataError: if the shards were made with another tokenizer, or if one is missing, has
            another size or is not in the manifest.
    """
    manifest = load_manifest(data_dir)
    if manifest is None:
        if error := unfinished_error(data_dir):
            raise DataError(error)
        return None
    made_with = manifest.tokenizer
    if made_with.sha256 != tokenizer.sha256:
        raise DataError(
            f"{data_dir}: was made with tokenizer {made_with.name!r}, but the model's is "
            f"{tokenizer.name!r}; train with --tokenizer {made_with.name}, or prepare the text "
            f"again with {PREPARE} --tokenizer {tokenizer.name} --out ANOTHER_FOLDER"
        )
    refuse(list(listing_errors(data_dir, manifest)))
    return fingerprint(manifest)


def unfinished_error(data_dir: Path) -> str | None:
    """For a folder without a manifest: an error if it cannot be trained on as it is, else None."""
    if (data_dir / "meta.pkl").exists():
        text = data_dir / "input.txt"
        return (
            f"{data_dir}: has nanoGPT's tokens with a vocabulary of its own in meta.pkl, which is "
            "not opened because a pickle can run any code; make them again from their text: "
            f"{PREPARE} {text if text.exists() else 'input.txt'} --tokenizer char --out "
            f"{data_dir}_tokens, and train with --data-dir {data_dir}_tokens"
        )
    if any(data_dir.glob("manifest-*-of-*.json")):
        return (
            f"{data_dir}: has the shards of several ranks, which an earlier version did not merge; "
            f"prepare the text again with {PREPARE} into another folder"
        )
    if any((data_dir / WORK_FOLDER).rglob("*.json")):
        return (
            f"{data_dir}: is not finished; unless its {PREPARE} command is still running, run that "
            f"again to resume, or delete {data_dir / WORK_FOLDER} to train on the shards that are "
            "there"
        )
    return None


def fingerprint(manifest: Manifest) -> str:
    """A short hash of the tokenizer and of every shard's checksum, equal for equal data."""
    lines = [manifest.tokenizer.sha256]
    lines += [f"{shard.split} {shard.sha256}" for shard in manifest.shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def listing_errors(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    """A sentence for each shard that is missing, has another size, or is not in the manifest."""
    yield from size_errors(data_dir, manifest.shards, np.dtype(manifest.dtype))
    listed = {shard.file for shard in manifest.shards}
    for path in token_files(sorted(data_dir.iterdir())):
        if path.name not in listed:
            yield f"{path}: is not in {MANIFEST}; move it to another folder"


def size_errors(data_dir: Path, shards: Iterable[ShardEntry], dtype: np.dtype) -> Iterator[str]:
    """A sentence for each shard that is missing or does not have the size it was written with."""
    for shard in shards:
        path = data_dir / shard.file
        expected = HEADER_BYTES + dtype.itemsize * shard.tokens
        if not path.is_file():
            yield f"{path}: is missing; {_remedy(data_dir)}"
        elif path.stat().st_size != expected:
            yield (
                f"{path}: has {path.stat().st_size:,} bytes, but {expected:,} were written; "
                f"{_remedy(data_dir)}"
            )


def checksum_errors(
    data_dir: Path, manifest: Manifest, advance: Callable[[int], object]
) -> Iterator[str]:
    """A sentence for each shard whose checksum is not the manifest's; reads every file."""
    for shard in manifest.shards:
        path = data_dir / shard.file
        if path.is_file() and sha256_of(path, advance) != shard.sha256:
            yield f"{path}: checksum mismatch with {MANIFEST}; {_remedy(data_dir)}"


def count_documents(
    file: TokenFile, tokenizer: Tokenizer, advance: Callable[[int], object] = lambda _: None
) -> int:
    """The number of documents that begin in a file; `advance` gets the bytes of each read.

    Raises DataError for an id that is outside the tokenizer's vocabulary.
    """
    stream, documents = TokenStream([file], str(file.path)), 0
    for start, tokens in stream.chunks():
        stream.check_ids(tokens[None], np.array([start]), tokenizer.n_vocab)
        documents += int(np.count_nonzero(tokens == tokenizer.eot))
        advance(tokens.nbytes)
    return documents


def _remedy(data_dir: Path) -> str:
    return f"copy {data_dir} again, or delete it and make it with {PREPARE}"
