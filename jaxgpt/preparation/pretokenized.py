"""`--ready`: GPT-2 token shards that others have made of FineWeb, downloaded and checked."""

import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.filesize import decimal

from jaxgpt.data.manifest import (
    MANIFEST,
    Manifest,
    ShardEntry,
    Validation,
    count_documents,
    size_errors,
)
from jaxgpt.data.shards import TokenStream, split_of
from jaxgpt.data.token_file import HEADER_BYTES, DataError, inspect_file
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import FormatError, decode_json, move_file, sha256_of, write_json
from jaxgpt.preparation.estimate import check_disk
from jaxgpt.preparation.flags import Flags, count
from jaxgpt.preparation.hub import (
    DOWNLOADS,
    download,
    find_commit,
    list_files,
    remove_torn_downloads,
)
from jaxgpt.preparation.journal import Journal
from jaxgpt.preparation.manifest import sort_shards, tokenizer_entry, total_splits
from jaxgpt.preparation.output_folder import Folder
from jaxgpt.preparation.progress import PreparationConsole

# Which repository has a sample as shards of 100M tokens, its validation shard among them.
READY = {
    ("fineweb", "sample-10BT"): "kjj0/fineweb10B-gpt2",
    ("fineweb", "sample-100BT"): "kjj0/fineweb100B-gpt2",
    ("fineweb-edu", "sample-10BT"): "kjj0/finewebedu10B-gpt2",
    ("fineweb-edu", "sample-100BT"): "karpathy/fineweb-edu-100B-gpt2-token-shards",
}


class ReadySource(msgspec.Struct):
    """The contents of ready.json."""

    repo: str


LARGEST_10B = 10_200_000_000  # training tokens in the smaller ones


def fetch_ready(flags: Flags, folder: Folder) -> Manifest:
    """Download what is still missing in a folder; returns its manifest. Raises UserError."""
    out, work = folder.out, folder.work
    if folder.world_size > 1:
        raise UserError("--ready is a download; do it in one process: --rank 0 --world-size 1")
    tokens = count(flags, "tokens")
    repo = ready_repository(flags.inputs[0], flags.name, tokens)
    _check_source(work, repo, out)
    commit, files = list_shards(repo, tokens, flags.revision, print)
    write_json(work / "ready.json", {"repo": repo})
    tokenizer, journal = load_tokenizer("gpt2"), Journal(work / "shards.jsonl", ShardEntry)
    _adopt(out, files, journal, tokenizer)
    _download_missing(repo, commit, files, folder, journal, tokenizer)
    shards = list(_by_name(journal).values())
    manifest = Manifest(
        jaxgpt=version("jaxgpt"),
        source={"kind": "ready-made shards", "repo": repo, "commit": commit},
        tokenizer=tokenizer_entry(tokenizer),
        validation=Validation(rule="as its makers chose it"),
        splits=total_splits(shards),
        shards=sort_shards(shards),
    )
    manifest.save(out / MANIFEST)
    shutil.rmtree(work / DOWNLOADS, ignore_errors=True)
    return manifest


def _check_source(work: Path, repo: str, out: Path) -> None:
    if (work / "plan.json").exists():
        raise UserError(f"{out}: holds tokens made of text; give ready-made ones another --out")
    path = work / "ready.json"
    try:
        was = decode_json(path.read_bytes(), ReadySource).repo if path.exists() else repo
    except FormatError as error:
        raise UserError(f"{path}: {error}; delete {out} and download it again") from None
    if was != repo:
        raise UserError(f"{out}: holds shards of {was}; give those of {repo} another --out")


def ready_repository(dataset: str, name: str | None, tokens: int | None) -> str:
    """The repository for a data set's name and how much is wanted; raises UserError."""
    if "/" in dataset:
        return dataset
    if name is None:
        name = "sample-10BT" if (tokens or 0) <= LARGEST_10B else "sample-100BT"
    if (dataset, name) not in READY:
        raise UserError(
            f"{dataset} {name}: nobody is known to offer it as ready-made shards; there are "
            + ", ".join(" ".join(key) for key in READY)
            + ", or owner/name of any repository with such files"
        )
    return READY[dataset, name]


def list_shards(
    repo: str, tokens: int | None, revision: str | None, say: Callable[[str], object]
) -> tuple[str, list[Any]]:
    """(commit, files) with at least `tokens` training tokens, validation first. UserError."""
    what = f"data set {repo!r}"
    commit = find_commit(repo, revision, say)
    shards = [f for f in list_files(repo, None, commit, say) if f.path.endswith(".bin")]
    val = [f for f in shards if split_of(Path(f.path)) == "val"]
    train = [f for f in shards if split_of(Path(f.path)) == "train"]
    if not val or not train:
        raise UserError(
            f"{what}: has no shards *_train_*.bin and *_val_*.bin; leave --ready out to tokenize "
            "its text"
        )
    wanted, sofar = [], 0
    for file in train:
        if tokens is not None and sofar >= tokens:
            break
        wanted.append(file)
        sofar += (file.size - HEADER_BYTES) // 2
    if tokens is not None and sofar < tokens:
        say(f"{what}: has {sofar:,} training tokens, fewer than the {tokens:,} asked for")
    return commit, [*val, *wanted]


def _name(file: Any) -> str:
    return str(file.path).rsplit("/", 1)[-1]


def _is_missing(out: Path, entry: ShardEntry | None) -> bool:
    return entry is None or any(size_errors(out, [entry]))


def _by_name(journal: Journal[ShardEntry]) -> dict[str, ShardEntry]:
    return {entry.file: entry for entry in journal.entries}


def _adopt(
    out: Path, files: Sequence[Any], journal: Journal[ShardEntry], tokenizer: Tokenizer
) -> None:
    """Note shards that had arrived when a kill came before their line in the journal."""
    known = _by_name(journal)
    for name in map(_name, files):
        if name not in known and (out / name).exists():
            journal.append(_entry(out / name, tokenizer))


def _download_missing(
    repo: str,
    commit: str,
    files: Sequence[Any],
    folder: Folder,
    journal: Journal[ShardEntry],
    tokenizer: Tokenizer,
) -> None:
    """Download, check and note the shards that are not there; raises UserError."""
    out, downloads, known = folder.out, folder.work / DOWNLOADS, _by_name(journal)
    missing = [file for file in files if _is_missing(out, known.get(_name(file)))]
    total, needed = (sum(file.size for file in some) for some in (files, missing))
    free = check_disk(out, needed)
    print(f"{repo}: {len(files)} shards, {decimal(total)}, to {out} ({free} are free)", flush=True)
    (out / MANIFEST).unlink(missing_ok=True)  # a folder that has one is complete
    remove_torn_downloads(downloads)
    with PreparationConsole(total, total - needed) as console:
        for file in missing:
            console.update(total - needed, 0, 0, f"downloading {_name(file)}")
            sha256 = file.lfs.sha256 if file.lfs else None
            got = download(repo, file.path, file.size, sha256, commit, downloads, console.say)
            _check(got, file.path, tokenizer)
            move_file(got, out / _name(file))
            journal.append(_entry(out / _name(file), tokenizer))
            needed -= file.size


def _check(path: Path, name: str, tokenizer: Tokenizer) -> None:
    """Raises DataError, and removes the file, unless it is a shard of the tokenizer's ids."""
    try:
        stream = TokenStream([inspect_file(path)], name)
        for start, tokens in stream.chunks():
            stream.check_ids(tokens[None], np.array([start]), tokenizer.n_vocab)
    except DataError:
        path.unlink()
        raise


def _entry(path: Path, tokenizer: Tokenizer) -> ShardEntry:
    found = inspect_file(path)
    return ShardEntry(
        file=path.name,
        split="val" if split_of(path) == "val" else "train",
        tokens=found.length,
        documents=count_documents(found, tokenizer.eot),
        sha256=sha256_of(path),
    )
