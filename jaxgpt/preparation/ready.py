"""`--ready`: GPT-2 token shards that others have made of FineWeb, downloaded and checked."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from jaxgpt.data.manifest import MANIFEST, count_documents, lost_shards, sha256_of
from jaxgpt.data.shards import TokenStream, split_of
from jaxgpt.data.token_file import HEADER_BYTES, DataError, inspect_file
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.data.writing import write_json
from jaxgpt.errors import UserError
from jaxgpt.preparation.estimate import check_disk
from jaxgpt.preparation.flags import Flags, count
from jaxgpt.preparation.hub import DOWNLOADS, download, retrying
from jaxgpt.preparation.journal import Journal
from jaxgpt.preparation.planning import Folder
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.summary import base_manifest

# Which repository has a sample as shards of 100M tokens, its validation shard among them.
READY = {
    ("fineweb", "sample-10BT"): "kjj0/fineweb10B-gpt2",
    ("fineweb", "sample-100BT"): "kjj0/fineweb100B-gpt2",
    ("fineweb-edu", "sample-10BT"): "kjj0/finewebedu10B-gpt2",
    ("fineweb-edu", "sample-100BT"): "karpathy/fineweb-edu-100B-gpt2-token-shards",
}
LARGEST_10B = 10_200_000_000  # training tokens in the smaller ones


def fetch_ready(flags: Flags, folder: Folder) -> dict[str, Any]:
    """Download what is still missing in a folder; returns its manifest. Raises UserError."""
    out, work = folder.out, folder.work
    if folder.world_size > 1:
        raise UserError("--ready is a download; do it in one process: --rank 0 --world-size 1")
    tokens = count(flags, "tokens")
    repo = ready_repository(flags.inputs[0], flags.name, tokens)
    _check_source(work, repo, out)
    commit, files = list_shards(repo, tokens, flags.revision, print)
    write_json(work / "ready.json", {"repo": repo})
    here = sum(path.stat().st_size for path in out.glob("*.bin"))
    total = sum(file.size for file in files)
    free = check_disk(out, max(0, total - here) + max(file.size for file in files))
    print(f"{repo}: {len(files)} shards, {decimal(total)}, to {out} ({free} are free)", flush=True)
    with PreparationConsole(total, 0) as console:
        return _download_all(repo, commit, files, out, work, console)


def _check_source(work: Path, repo: str, out: Path) -> None:
    if (work / "plan.json").exists():
        raise UserError(f"{out}: holds tokens made of text; give ready-made ones another --out")
    path = work / "ready.json"
    was = json.loads(path.read_text(encoding="utf-8"))["repo"] if path.exists() else repo
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
    """The commit and the files: validation, and training shards until they hold `tokens`."""
    from huggingface_hub import HfApi

    api, what = HfApi(), f"data set {repo!r}"
    info = retrying(
        lambda: api.dataset_info(repo, revision=revision, timeout=20), what, say, first=True
    )
    commit = info.sha
    assert commit is not None
    found = retrying(
        lambda: list(
            api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
        ),
        what,
        say,
        first=True,
    )
    shards: list[Any] = sorted((f for f in found if f.path.endswith(".bin")), key=lambda f: f.path)
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


def _download_all(
    repo: str, commit: str, files: list[Any], out: Path, work: Path, console: PreparationConsole
) -> dict[str, Any]:
    """Download shards into `out`, check each, and write the manifest; returns it.

    Raises UserError for what cannot be had, and for a file that is not what it should be.
    """
    tokenizer = load_tokenizer("gpt2")
    journal = Journal(work / "shards.jsonl")
    known = {entry["file"]: entry for entry in journal.entries}
    done = tokens = documents = 0
    for file in files:
        name = file.path.rsplit("/", 1)[-1]
        console.update(done, tokens, documents, f"downloading {name}")
        path = out / name
        if name not in known or any(lost_shards(out, [known[name]])):
            if not path.exists() or name in known:
                got = download(repo, file.path, file.size, commit, work / DOWNLOADS, console.say)
                _check(got, file, tokenizer)
                os.replace(got, path)
            known[name] = _entry(path, tokenizer)
            journal.append(known[name])
        done += file.size
        tokens += known[name]["tokens"]
        documents += known[name]["documents"]
    manifest = base_manifest(
        tokenizer,
        {"kind": "ready-made shards", "repo": repo, "commit": commit},
        {"rule": "as its makers chose it"},
        None,
        list(known.values()),
    )
    write_json(out / MANIFEST, manifest)
    return manifest


def _check(path: Path, file: Any, tokenizer: Tokenizer) -> None:
    """Raises UserError, and removes the file, unless it is the shard that the Hub lists."""
    try:
        if file.lfs and sha256_of(path) != file.lfs.sha256:
            raise DataError(f"{file.path}: arrived damaged; the same command fetches it again")
        found = inspect_file(path)
        stream = TokenStream([found], file.path)
        for start in range(0, found.length, 1 << 22):
            tokens = stream.window(start, min(1 << 22, found.length - start))
            stream.check_ids(tokens[None], np.array([start]), tokenizer.n_vocab)
    except DataError:
        path.unlink()
        raise


def _entry(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    found = inspect_file(path)
    return {
        "file": path.name,
        "split": split_of(path),
        "tokens": found.length,
        "documents": count_documents(found, tokenizer.eot),
        "sha256": sha256_of(path),
    }
