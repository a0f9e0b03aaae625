"""manifest.json: what the shards in a folder are, and how to tell that they still are.

`jaxgpt.prepare` writes it last, so a folder that has one is complete. Folders without one (llm.c's,
modded-nanogpt's, nanoGPT's) are read all the same; there is then nothing to hold them against.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.shards import TokenStream
from jaxgpt.data.token_file import HEADER_BYTES, PREPARE, DataError, TokenFile, refuse
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.files import sha256_of

MANIFEST = "manifest.json"
WORK_FOLDER = ".prepare"  # what is not finished yet
VERSION = 1
REQUIRED = ("version", "source", "tokenizer", "validation", "splits", "shards")


def load_manifest(data_dir: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None where there is none; DataError if it cannot be read."""
    return read_manifest(data_dir / MANIFEST)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """`load_manifest` from a file that may have another name."""
    data_dir = path.parent
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read ({reason}); {_remedy(data_dir)}") from None
    is_ours = isinstance(manifest, dict) and all(name in manifest for name in REQUIRED)
    if not is_ours or (manifest["version"] == VERSION and not _has_our_types(manifest)):
        raise DataError(f"{path}: is no manifest of jaxgpt's; {_remedy(data_dir)}")
    if manifest["version"] != VERSION:
        raise DataError(
            f"{path}: is of version {manifest['version']}, and this jaxgpt reads {VERSION}; update "
            "jaxgpt, or prepare the text again"
        )
    return manifest


def _has_our_types(manifest: dict[str, Any]) -> bool:
    """Whether names, counts and checksums are where they are looked for, whoever wrote them."""
    splits, shards = manifest["splits"], manifest["shards"]
    return (
        fits(manifest, source=dict, tokenizer=dict, validation=dict, splits=dict, shards=list)
        and fits(manifest["tokenizer"], name=str, sha256=str, n_vocab=int)
        and fits(splits, train=dict, val=dict)
        and all(fits(split, tokens=int, documents=int) for split in splits.values())
        and all(fits(x, file=str, split=str, tokens=int, sha256=str) for x in shards)
    )


def fits(value: Any, **types: type) -> bool:
    """Whether it is a dict with such values under these names."""
    return isinstance(value, dict) and all(type(value.get(k)) is t for k, t in types.items())


def check_manifest(data_dir: Path, tokenizer: Tokenizer) -> str | None:
    """The fingerprint of a folder's data, None without a manifest.

    Raises DataError if another tokenizer made it, or if its shards are not those that were written:
    each must be there in its size, and none may have been added.
    """
    manifest = load_manifest(data_dir)
    if manifest is None:
        if error := unfinished(data_dir):
            raise DataError(error)
        return None
    made_with = manifest["tokenizer"]
    if made_with["sha256"] != tokenizer.sha256:
        raise DataError(
            f"{data_dir}: was made with tokenizer {made_with['name']!r}, and the model's is "
            f"{tokenizer.name!r}; train with --tokenizer {made_with['name']}, or prepare the text "
            f"again with {PREPARE} --tokenizer {tokenizer.name} --out ANOTHER_FOLDER"
        )
    refuse(list(size_errors(data_dir, manifest)))
    return fingerprint(manifest)


def unfinished(data_dir: Path) -> str | None:
    """What is still to be done before a folder without a manifest is complete, None for nothing."""
    if any(data_dir.glob("manifest-*-of-*.json")):
        return (
            f"{data_dir}: was prepared by several processes; join what they made with {PREPARE} "
            f"--merge {data_dir}"
        )
    if any((data_dir / WORK_FOLDER).rglob("*.json")):
        return (
            f"{data_dir}: is not finished; run its {PREPARE} command again, which goes on where it "
            f"stopped, or delete {data_dir / WORK_FOLDER} to train on the shards that are there"
        )
    return None


def fingerprint(manifest: dict[str, Any]) -> str:
    """A short hash of the tokenizer and of every shard's checksum, equal for equal data."""
    what = [manifest["tokenizer"]["sha256"]]
    what += [f"{shard['split']} {shard['sha256']}" for shard in manifest["shards"]]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]


def size_errors(data_dir: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """A sentence for each shard that is missing, of another size, or not in the manifest."""
    yield from lost_shards(data_dir, manifest["shards"])
    listed = {shard["file"] for shard in manifest["shards"]}
    for path in sorted(data_dir.glob("*.bin")):
        if path.name not in listed:
            yield f"{path}: is not in {MANIFEST}; move it to a folder of its own"


def lost_shards(data_dir: Path, shards: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A sentence for each shard that was written and is missing, or has another size."""
    for shard in shards:
        path, expected = data_dir / shard["file"], HEADER_BYTES + 2 * shard["tokens"]
        if not path.is_file():
            yield f"{path}: was written and is missing; {_remedy(data_dir)}"
        elif path.stat().st_size != expected:
            yield (
                f"{path}: has {path.stat().st_size:,} bytes, and {expected:,} were written; "
                f"{_remedy(data_dir)}"
            )


def checksum_errors(
    data_dir: Path, manifest: dict[str, Any], advance: Callable[[int], object]
) -> Iterator[str]:
    """A sentence for each shard whose content is no longer what was written; reads all of it."""
    for shard in manifest["shards"]:
        path = data_dir / shard["file"]
        if path.is_file() and sha256_of(path, advance) != shard["sha256"]:
            yield f"{path}: its checksum is not that of {MANIFEST}; {_remedy(data_dir)}"


def count_documents(file: TokenFile, eot: int) -> int:
    """How often the end-of-text token stands in a file: the documents that begin in it."""
    chunks = TokenStream([file], str(file.path)).chunks()
    return sum(int(np.count_nonzero(chunk == eot)) for _, chunk in chunks)


def _remedy(data_dir: Path) -> str:
    return f"copy {data_dir} again, or delete it and make it with {PREPARE}"
