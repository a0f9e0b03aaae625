"""Datasets on the Hugging Face Hub: listing their files and downloading them.

Everything is pinned to one commit, so that a run resumed next week reads the same files.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError, first_line
from jaxgpt.files import sha256_of
from jaxgpt.preparation.flags import CLIMBMIX_TOKENS, FINEWEB
from jaxgpt.preparation.hub_retry import T, retry_request
from jaxgpt.preparation.inputs import READABLE, Input, kind_of
from jaxgpt.preparation.work_files import HubSource

# The folder of each configuration of FineWeb and ClimbMix; FineWeb's dumps (CC-MAIN-2024-10) are in
# data/NAME.
FOLDERS = {
    "default": "data",
    "sample-10BT": "sample/10BT",
    "sample-100BT": "sample/100BT",
    "sample-350BT": "sample/350BT",
    "climbmix_small": "climbmix_small",
}

PARQUET_COPY = "the Hub has a parquet copy of most datasets: --revision refs/convert/parquet"
DOWNLOADS = "downloads"  # the folder for files while they are read


def list_dataset(
    repo: str, name: str | None, split: str, revision: str | None
) -> tuple[str, list[Input]]:
    """(commit, files) of a split of a dataset's configuration `name`; raises UserError."""
    commit = find_commit(repo, revision)
    if repo in (*FINEWEB.values(), CLIMBMIX_TOKENS) and name is not None:
        if split != "train":
            raise UserError(f"dataset {repo!r}: has no split {split!r}, only 'train'")
        found = list_files(repo, FOLDERS.get(name, f"data/{name}"), commit)
    else:
        paths = _request(repo, lambda: _files_of_configuration(repo, name, split, commit))
        found = _request(repo, lambda: _paths_info(repo, paths, commit))
    return commit, _inputs(found, repo)


def find_commit(repo: str, revision: str | None) -> str:
    """The commit of a dataset's `revision`; raises UserError."""
    from huggingface_hub import HfApi

    info = _request(repo, lambda: HfApi().dataset_info(repo, revision=revision, timeout=20))
    assert info.sha is not None
    return info.sha


def list_files(repo: str, folder: str | None, commit: str) -> list[Any]:
    """The files in a folder of a dataset, with path, size and lfs, sorted; raises UserError."""
    from huggingface_hub import HfApi

    def tree() -> list[Any]:
        options: dict[str, Any] = {"revision": commit, "repo_type": "dataset"}
        return list(HfApi().list_repo_tree(repo, folder, recursive=True, **options))

    found = _request(repo, tree)
    return sorted((file for file in found if hasattr(file, "size")), key=lambda file: file.path)


def _request(repo: str, request: Callable[[], T]) -> T:
    return retry_request(request, f"dataset {repo!r}", partial(print, flush=True), first=True)


def _inputs(found: Sequence[Any], repo: str) -> list[Input]:
    """Files of the Hub as inputs, sorted by path."""
    files = sorted(found, key=lambda file: file.path)
    inputs = [
        Input(
            path=file.path,
            size=file.size,
            kind=kind,
            check=file.lfs.sha256 if file.lfs else file.blob_id,
        )
        for file in files
        if (kind := kind_of(file.path))
    ]
    if not inputs:
        raise UserError(
            f"dataset {repo!r}: has no readable text files "
            f"({', '.join(f.path for f in files[:3]) or 'it has no files'}; expected {READABLE}); "
            + PARQUET_COPY
        )
    return inputs


def _files_of_configuration(repo: str, name: str | None, split: str, commit: str) -> list[str]:
    """The files that `datasets` finds by the dataset's card or by its conventions."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DataFilesNotFoundError

    try:
        builder = load_dataset_builder(repo, name, revision=commit)
    except DataFilesNotFoundError:
        raise UserError(f"dataset {repo!r}: has no data files; check the name") from None
    except ValueError as error:  # an unknown configuration, or none where one must be chosen
        raise UserError(f"dataset {repo!r}: {' '.join(str(error).split())}; use --name") from None
    except RuntimeError as error:  # it needs a loading script, which datasets no longer supports
        raise UserError(f"dataset {repo!r}: {first_line(error)}; {PARQUET_COPY}") from None
    splits = builder.config.data_files or {}
    if split not in splits:
        raise UserError(
            f"dataset {repo!r}: has no split {split!r}; choose with --split "
            f"({', '.join(map(str, splits)) or 'it lists none'})"
        )
    marker = f"@{commit}/"
    return [str(path).split(marker, 1)[-1] for path in splits[split]]


def _paths_info(repo: str, paths: list[str], commit: str) -> list[Any]:
    from huggingface_hub import HfApi

    found: list[Any] = []
    for start in range(0, len(paths), 500):
        some = paths[start : start + 500]
        found += HfApi().get_paths_info(repo, some, revision=commit, repo_type="dataset")
    return found


def download(
    repo: str,
    path: str,
    size: int,
    sha256: str | None,
    commit: str,
    folder: Path,
    say: Callable[[str], object],
) -> Path:
    """Download one file of a dataset into `folder` and check its size and SHA-256.

    Raises UserError, also for a path outside `folder`.
    """
    from huggingface_hub import hf_hub_download

    # The server chooses the names, and some versions of the client do not check them.
    if path.startswith("/") or ".." in path.split("/"):
        raise UserError(
            f"dataset {repo!r}: has a file {path!r}, which is outside the dataset's folder and "
            "is not downloaded; prepare another dataset or local files"
        )

    def fetch() -> Path:
        try:
            got = Path(
                hf_hub_download(repo, path, repo_type="dataset", revision=commit, local_dir=folder)
            )
        except RuntimeError as error:  # hf_xet raises this for every failure
            raise ConnectionError(str(error)) from error
        if got.stat().st_size != size or (sha256 is not None and sha256_of(got) != sha256):
            got.unlink()
            raise ConnectionError("the download is corrupt")
        return got

    return retry_request(fetch, f"{path} of dataset {repo!r}", say, first=False)


def remove_leftover_downloads(folder: Path) -> None:
    """Delete partial downloads of a killed run, which huggingface_hub 2 would not resume."""
    for path in folder.rglob("*.*.????????.incomplete"):
        path.unlink(missing_ok=True)


class Downloads:
    """Background downloads, a few files ahead of the one that is needed next.

    `ahead` says how many, at any time: a cluster may grow.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        source: HubSource,
        folder: Path,
        ahead: Callable[[], int],
        say: Callable[[str], object],
    ):
        remove_leftover_downloads(folder)
        self._source, self._folder, self._say = source, folder, say
        self._ahead, self._threads = ahead, 0
        self._order = list(inputs)
        self._places = {item.path: place for place, item in enumerate(inputs)}
        self._queue: queue.SimpleQueue[tuple[Input, Future[Path]]] = queue.SimpleQueue()
        self._futures: dict[str, Future[Path]] = {}

    def local(self, needed: Input) -> Path | None:
        """The path of a downloaded file, None while it is downloading.

        Raises what its download raised.
        """
        place, ahead = self._places[needed.path], self._ahead()
        for _ in range(self._threads, ahead):
            # A daemon, or Ctrl-C would wait for the end of a download.
            threading.Thread(target=self._work, daemon=True).start()
        self._threads = max(self._threads, ahead)
        for item in self._order[place : place + ahead]:
            if item.path not in self._futures:
                self._futures[item.path] = Future()
                self._queue.put((item, self._futures[item.path]))
        future = self._futures[needed.path]
        return future.result() if future.done() else None

    def delete(self, item: Input) -> None:
        """Delete a downloaded file."""
        (self._folder / item.path).unlink(missing_ok=True)

    def _get(self, item: Input) -> Path:
        sha256 = item.check if len(item.check) == 64 else None  # git's for small files is shorter
        repo, commit = self._source.repo, self._source.commit
        return download(repo, item.path, item.size, sha256, commit, self._folder, self._say)

    def _work(self) -> None:
        while True:
            item, future = self._queue.get()
            try:
                future.set_result(self._get(item))
            except BaseException as error:
                future.set_exception(error)
