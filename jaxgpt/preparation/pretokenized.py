"""`--ready`: ready-made shards of GPT-2 tokens of FineWeb, downloaded and checked."""

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from rich.filesize import decimal

from jaxgpt.data.manifest import (
    MANIFEST,
    Manifest,
    ShardEntry,
    Validation,
    count_documents,
)
from jaxgpt.data.shards import split_of
from jaxgpt.data.token_file import HEADER_BYTES, DataError, inspect_file
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import FormatError, decode_json, move_file, read_file, sha256_of, write_json
from jaxgpt.preparation.flags import PrepareFlags
from jaxgpt.preparation.hub import (
    DOWNLOADS,
    download,
    find_commit,
    list_files,
    remove_leftover_downloads,
)
from jaxgpt.preparation.output_folder import OutputFolder, check_free_space
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.text_manifest import tokenizer_entry, total_splits
from jaxgpt.preparation.work_files import Journal
from jaxgpt.run.console import counted

# Repositories with a sample as shards of 100M tokens, including a validation shard.
READY = {
    ("fineweb", "sample-10BT"): "kjj0/fineweb10B-gpt2",
    ("fineweb", "sample-100BT"): "kjj0/fineweb100B-gpt2",
    ("fineweb-edu", "sample-10BT"): "kjj0/finewebedu10B-gpt2",
    ("fineweb-edu", "sample-100BT"): "karpathy/fineweb-edu-100B-gpt2-token-shards",
}
LARGEST_10B = 10_200_000_000  # training tokens in the 10BT repositories


class ReadySource(msgspec.Struct):
    """The contents of ready.json."""

    repo: str


def download_ready(flags: PrepareFlags, folder: OutputFolder) -> Manifest:
    """Download the missing shards of a folder and return its manifest. Raises UserError."""
    out, work = folder.out, folder.work
    tokens = flags.number_of("tokens")
    repo = ready_repository(flags.inputs[0], flags.name, tokens)
    _refuse_other_source(work, repo, out)
    commit, files = list_shards(repo, tokens, flags.revision)
    write_json(work / "ready.json", {"repo": repo})
    tokenizer = load_tokenizer("gpt2")
    shards = _download_missing(repo, commit, files, folder, tokenizer)
    manifest = Manifest(
        jaxgpt=version("jaxgpt"),
        source={"kind": "ready-made shards", "repo": repo, "commit": commit},
        tokenizer=tokenizer_entry(tokenizer),
        validation=Validation(rule="as its makers chose it"),
        splits=total_splits(shards),
        shards=sorted(shards),
    )
    manifest.save(out / MANIFEST)
    shutil.rmtree(work / DOWNLOADS, ignore_errors=True)
    return manifest


def _refuse_other_source(work: Path, repo: str, out: Path) -> None:
    if (work / "plan.json").exists():
        raise UserError(f"{out}: contains shards prepared from text; choose another --out")
    path = work / "ready.json"
    try:
        was = decode_json(read_file(path), ReadySource).repo if path.exists() else repo
    except FormatError as error:
        raise UserError(f"{path}: {error}; delete {out} and download it again") from None
    if was != repo:
        raise UserError(
            f"{out}: contains shards of {was}; choose another --out for those of {repo}"
        )


def ready_repository(dataset: str, name: str | None, tokens: int | None) -> str:
    """The repository for a dataset's name and number of tokens; raises UserError."""
    if "/" in dataset:
        return dataset
    if name is None:
        name = "sample-10BT" if (tokens or 0) <= LARGEST_10B else "sample-100BT"
    if (dataset, name) not in READY:
        raise UserError(
            f"{dataset} {name}: no ready-made shards are known; use "
            + ", ".join(" ".join(key) for key in READY)
            + ", or owner/name of a repository with such files"
        )
    return READY[dataset, name]


def list_shards(repo: str, tokens: int | None, revision: str | None) -> tuple[str, list[Any]]:
    """(commit, files) with at least `tokens` training tokens, validation first.

    Raises UserError.
    """
    what = f"dataset {repo!r}"
    commit = find_commit(repo, revision)
    shards = [f for f in list_files(repo, None, commit) if f.path.endswith(".bin")]
    val = [f for f in shards if split_of(Path(f.path)) == "val"]
    train = [f for f in shards if split_of(Path(f.path)) == "train"]
    if not val or not train:
        raise UserError(
            f"{what}: has no shards *_train_*.bin and *_val_*.bin; to tokenize its text, leave "
            "out --ready"
        )
    needed, total = [], 0
    for file in train:
        if tokens is not None and total >= tokens:
            break
        needed.append(file)
        total += (file.size - HEADER_BYTES) // 2
    if tokens is not None and total < tokens:
        print(f"{what}: has only {total:,} training tokens, not {tokens:,}")
    _refuse_equal_names(what, [*val, *needed])
    return commit, [*val, *needed]


def _refuse_equal_names(what: str, files: Sequence[Any]) -> None:
    """Raises UserError if two files would have one place: shards are stored without folders."""
    paths: dict[str, str] = {}
    for path in (file.path for file in files):
        other = paths.setdefault(Path(path).name, path)
        if other != path:
            raise UserError(
                f"{what}: {other} and {path} have the same name; download one of their "
                "folders, and train on it with --data-dir"
            )


def _download_missing(
    repo: str, commit: str, files: Sequence[Any], folder: OutputFolder, tokenizer: Tokenizer
) -> list[ShardEntry]:
    """Download and check the missing shards; returns the entries of all. Raises UserError.

    A shard is moved to its place when it is complete, and recorded then or by the next run.
    """
    out, downloads = folder.out, folder.work / DOWNLOADS
    journal = Journal(folder.work / "shards.jsonl", ShardEntry)
    entries = {entry.file: entry for entry in journal.entries}  # the newest of each
    total, missing = 0, []
    for file in files:
        path = out / Path(file.path).name
        total += file.size
        if not path.is_file() or path.stat().st_size != file.size:
            entries.pop(path.name, None)
            missing.append(file)
    needed = sum(file.size for file in missing)
    free = check_free_space(out, needed)
    shards = counted(len(files), "shard")
    print(f"{repo}: {shards}, {decimal(total)}, to {out} ({free} free)", flush=True)
    (out / MANIFEST).unlink(missing_ok=True)  # a folder with a manifest is complete
    remove_leftover_downloads(downloads)
    with PreparationConsole(total, total - needed) as console:
        for file in files:
            name = Path(file.path).name
            if file in missing:
                console.update(total - needed, 0, 0, f"downloading {name}")
                sha256 = file.lfs.sha256 if file.lfs else None
                path = download(repo, file.path, file.size, sha256, commit, downloads, console.say)
                try:
                    entry = _shard_entry(path, tokenizer)
                except DataError:
                    path.unlink()
                    raise
                move_file(path, out / name)
                needed -= file.size
            elif name not in entries:
                entry = _shard_entry(out / name, tokenizer)
            else:
                continue
            journal.append(entry)
            entries[name] = entry
    return [entry for entry in entries.values() if (out / entry.file).is_file()]


def _shard_entry(path: Path, tokenizer: Tokenizer) -> ShardEntry:
    """Raises DataError if the file is not a shard, or has ids that the tokenizer lacks."""
    found = inspect_file(path)
    return ShardEntry(
        file=path.name,
        split="val" if split_of(path) == "val" else "train",
        tokens=found.length,
        documents=count_documents(found, tokenizer),
        sha256=sha256_of(path),
    )
