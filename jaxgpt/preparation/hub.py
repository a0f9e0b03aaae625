"""Data sets on the Hugging Face Hub: which files they consist of, and getting them here.

Everything is pinned to one commit, so that a run that goes on next week reads what it began with.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.errors import UserError, first_line
from jaxgpt.files import sha256_of
from jaxgpt.preparation.flags import DATASETS
from jaxgpt.preparation.hub_retry import retrying
from jaxgpt.preparation.inputs import READABLE, Input, kind_of

# Where FineWeb's configurations lie; one of its dumps, CC-MAIN-2024-10, in data/ under its name.
FOLDERS = {
    "default": "data",
    "sample-10BT": "sample/10BT",
    "sample-100BT": "sample/100BT",
    "sample-350BT": "sample/350BT",
}

PARQUET_COPY = "the Hub keeps a parquet copy of most: --revision refs/convert/parquet"
DOWNLOADS = "downloads"  # where files lie while they are read
AHEAD = 2  # files downloaded while others are being read


class Listing(NamedTuple):
    """The files of one split at one commit."""

    commit: str
    inputs: list[Input]


def list_dataset(
    repo: str, name: str | None, split: str, revision: str | None, say: Callable[[str], object]
) -> Listing:
    """The files of a data set's configuration `name`; raises UserError."""
    from huggingface_hub import HfApi

    commit = find_commit(repo, revision, say)
    if repo in DATASETS.values() and name is not None:
        if split != "train":
            raise UserError(f"data set {repo!r}: has no split {split!r}, only 'train'")
        found = list_files(repo, FOLDERS.get(name, f"data/{name}"), commit, say)
    else:
        what, api = f"data set {repo!r}", HfApi()
        paths = retrying(
            lambda: _files_of_configuration(repo, name, split, commit), what, say, first=True
        )
        found = retrying(lambda: _paths_info(api, repo, paths, commit), what, say, first=True)
    return Listing(commit, _inputs(found, repo))


def find_commit(repo: str, revision: str | None, say: Callable[[str], object]) -> str:
    """The commit that a data set's `revision` is now; raises UserError."""
    from huggingface_hub import HfApi

    info = retrying(
        lambda: HfApi().dataset_info(repo, revision=revision, timeout=20),
        f"data set {repo!r}",
        say,
        first=True,
    )
    assert info.sha is not None
    return info.sha


def list_files(
    repo: str, folder: str | None, commit: str, say: Callable[[str], object]
) -> list[Any]:
    """The files under a folder of a data set, with path, size and lfs, by path; UserError."""
    from huggingface_hub import HfApi

    found = retrying(
        lambda: list(
            HfApi().list_repo_tree(
                repo, folder, recursive=True, revision=commit, repo_type="dataset"
            )
        ),
        f"data set {repo!r}",
        say,
        first=True,
    )
    return sorted((file for file in found if hasattr(file, "size")), key=lambda file: file.path)


def _inputs(found: Sequence[Any], repo: str) -> list[Input]:
    """Files of the Hub as inputs, in the order of their paths."""
    files = sorted(found, key=lambda file: file.path)
    known = [file for file in files if kind_of(file.path)]
    if not known:
        raise UserError(
            f"data set {repo!r}: its files are no text that can be read here "
            f"({', '.join(f.path for f in files[:3]) or 'it has none'}; wanted {READABLE}); "
            + PARQUET_COPY
        )
    return [
        Input(
            path=file.path,
            size=file.size,
            kind=kind_of(file.path) or "text",
            check=file.lfs.sha256 if file.lfs else file.blob_id,
        )
        for file in known
    ]


def _files_of_configuration(repo: str, name: str | None, split: str, commit: str) -> list[str]:
    """What `datasets` finds by the data set's card, or by its usual folders."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DataFilesNotFoundError

    try:
        builder = load_dataset_builder(repo, name, revision=commit)
    except DataFilesNotFoundError:
        raise UserError(f"data set {repo!r}: has no data files; is it the right one?") from None
    except ValueError as error:  # an unknown configuration, or none where one must be chosen
        raise UserError(f"data set {repo!r}: {' '.join(str(error).split())}; use --name") from None
    except RuntimeError as error:  # it has a script of its own, which is no longer run
        raise UserError(f"data set {repo!r}: {first_line(error)}; {PARQUET_COPY}") from None
    splits = builder.config.data_files or {}
    if split not in splits:
        raise UserError(
            f"data set {repo!r}: has no split {split!r}; choose with --split "
            f"({', '.join(map(str, splits)) or 'it lists none'})"
        )
    marker = f"@{commit}/"
    return [str(path).split(marker, 1)[-1] for path in splits[split]]


def _paths_info(api: Any, repo: str, paths: list[str], commit: str) -> list[Any]:
    found: list[Any] = []
    for start in range(0, len(paths), 500):
        some = paths[start : start + 500]
        found += api.get_paths_info(repo, some, revision=commit, repo_type="dataset")
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
    """One file of a data set, under `folder`, as the Hub has it.

    Raises UserError, also for a name that leads out of `folder`.
    """
    from huggingface_hub import hf_hub_download

    # Not all versions of the client look, and the names are the server's.
    if path.startswith("/") or ".." in path.split("/"):
        raise UserError(
            f"data set {repo!r}: has a file {path!r}, whose name leads out of its folder; it is "
            "not downloaded: prepare files of your own instead"
        )

    def fetch() -> Path:
        try:
            got = Path(
                hf_hub_download(repo, path, repo_type="dataset", revision=commit, local_dir=folder)
            )
        except RuntimeError as error:  # what hf_xet says whatever it was that failed
            raise ConnectionError(str(error)) from error
        if got.stat().st_size != size or (sha256 is not None and sha256_of(got) != sha256):
            got.unlink()
            raise ConnectionError("arrived damaged")
        return got

    return retrying(fetch, f"{path} of data set {repo!r}", say, first=False)


def remove_torn_downloads(folder: Path) -> None:
    """Delete what a kill left of downloads that huggingface_hub 2 would never continue."""
    for path in folder.rglob("*.*.????????.incomplete"):
        path.unlink(missing_ok=True)


class Downloads:
    """Files on their way, a few ahead of the one that is wanted, in the order of `inputs`."""

    def __init__(self, inputs: Sequence[Input], get: Callable[[Input], Path]):
        self._get = get
        self._order = list(inputs)
        self._places = {item.path: place for place, item in enumerate(inputs)}
        self._wanted: queue.SimpleQueue[tuple[Input, Future[Path]]] = queue.SimpleQueue()
        self._futures: dict[str, Future[Path]] = {}
        for _ in range(AHEAD):  # daemons, or Ctrl-C would wait for the end of a file
            threading.Thread(target=self._work, daemon=True).start()

    def local(self, wanted: Input) -> Path | None:
        """Where a file is once it is here, None before; raises what its download raised."""
        place = self._places[wanted.path]
        for item in self._order[place : place + AHEAD]:
            if item.path not in self._futures:
                self._futures[item.path] = Future()
                self._wanted.put((item, self._futures[item.path]))
        future = self._futures[wanted.path]
        return future.result() if future.done() else None

    def _work(self) -> None:
        while True:
            item, future = self._wanted.get()
            try:
                future.set_result(self._get(item))
            except BaseException as error:
                future.set_exception(error)
