"""Data sets on the Hugging Face Hub: which files they consist of, and getting them here.

Everything is pinned to one commit, so that a run that goes on next week reads what it began with.
The Hub limits how often it may be asked; a refusal is waited out before anyone is told of it.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxgpt.errors import UserError
from jaxgpt.preparation.inputs import READABLE, Input, kind_of

T = TypeVar("T")

DATASETS = {
    "fineweb": "HuggingFaceFW/fineweb",
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
}
SAMPLES = {name: f"sample/{name.removeprefix('sample-')}" for name in (
    "sample-10BT", "sample-100BT", "sample-350BT"
)}  # fmt: skip

WAITS = (1, 2, 4, 8, 15, 30, 60)  # seconds between tries
QUICK_WAITS = (0.5, 1)  # when the first question of all finds no network
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

    def ask(question: Callable[[], T]) -> T:
        return retrying(question, f"data set {repo!r}", say, first=True)

    api = HfApi()
    commit = ask(lambda: api.dataset_info(repo, revision=revision, timeout=20)).sha
    assert commit is not None
    if repo in DATASETS.values() and name is not None:
        if split != "train":
            raise UserError(f"data set {repo!r}: has no split {split!r}, only 'train'")
        folder = SAMPLES.get(name, f"data/{name}")
        found = ask(
            lambda: list(
                api.list_repo_tree(
                    repo, folder, recursive=True, revision=commit, repo_type="dataset"
                )
            ),
        )
    else:
        paths = ask(lambda: _files_of_configuration(repo, name, split, commit))
        found = ask(lambda: _paths_info(api, repo, paths, commit))
    return Listing(commit, _inputs(found, repo))


def _inputs(found: Sequence[Any], repo: str) -> list[Input]:
    """Files of the Hub as inputs, in the order of their paths."""
    files = sorted((f for f in found if hasattr(f, "size")), key=lambda f: f.path)
    known = [file for file in files if kind_of(file.path)]
    if not known:
        raise UserError(
            f"data set {repo!r}: its files are no text that can be read here "
            f"({', '.join(f.path for f in files[:3]) or 'it has none'}; wanted {READABLE}); the "
            "Hub keeps a parquet copy of most: --revision refs/convert/parquet"
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
    repo: str, path: str, size: int, commit: str, folder: Path, say: Callable[[str], object]
) -> Path:
    """One file of a data set, under `folder`; continues one that was cut off.

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
        got = Path(
            hf_hub_download(repo, path, repo_type="dataset", revision=commit, local_dir=folder)
        )
        if got.stat().st_size != size:
            got.unlink()
            raise ConnectionError(f"{path} came with another size than {size:,} bytes")
        return got

    return retrying(fetch, f"{path} of data set {repo!r}", say, first=False)


class Downloads:
    """Files on their way, a few ahead of the one that is wanted, in the order of `inputs`."""

    def __init__(self, inputs: Sequence[Input], get: Callable[[Input], Path]):
        self._get = get
        self._order = list(inputs)
        self._wanted: queue.SimpleQueue[tuple[Input, Future[Path]]] = queue.SimpleQueue()
        self._futures: dict[str, Future[Path]] = {}
        for _ in range(AHEAD):  # daemons, or Ctrl-C would wait for the end of a file
            threading.Thread(target=self._work, daemon=True).start()

    def local(self, wanted: Input) -> Path | None:
        """Where a file is once it is here, None before; raises what its download raised."""
        index = self._order.index(wanted)
        for item in self._order[index : index + AHEAD]:
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


def retrying(
    question: Callable[[], T], what: str, say: Callable[[str], object], *, first: bool
) -> T:
    """The answer to a question to the Hub, asked again while the network or the Hub refuses.

    Raises UserError, in a sentence, for what waiting does not mend and when patience is at an end.
    `first`: nothing has worked yet, so a network that is not there is not waited for long.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()  # there is one bar already
    logging.set_verbosity_error()  # the client tries again by itself too, and warns of each time
    tries = 0
    while True:
        try:
            return question()
        except UserError:
            raise
        except Exception as error:
            status = _status(error)
            waits = QUICK_WAITS if first and status is None else WAITS
            if not _may_pass(error) or tries >= len(waits):
                raise UserError(_explain(error, what, status)) from None
            wait = max(waits[tries], _asked_wait(error))
            say(f"{what}: {_reason(error, status)}; trying again in {wait:g} s")
            time.sleep(wait)
            tries += 1


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, None if there was no answer."""
    return getattr(_response(error), "status_code", None)


def _response(error: BaseException | None) -> Any:
    """What the Hub answered, where an error came of that; the client wraps some of its errors."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return getattr(error, "response", None)


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return _is_network_error(error)


def _is_network_error(error: BaseException | None) -> bool:
    """By the names of the classes too: huggingface_hub has changed its HTTP library twice."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if error is None or isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"TransportError", "RequestException", "RemoteProtocolError"})


def _asked_wait(error: BaseException) -> float:
    """Seconds that the Hub asks to wait, at most five minutes."""
    headers = getattr(_response(error), "headers", None) or {}
    asked = str(headers.get("retry-after", ""))
    return min(300.0, float(asked)) if asked.replace(".", "", 1).isdigit() else 0.0


def _reason(error: BaseException, status: int | None) -> str:
    if status == 429:
        return "the Hub limits the rate of requests (429)"
    if status is not None:
        return f"the Hub answered {status}"
    return "the Hub could not be reached"


def _explain(error: BaseException, what: str, status: int | None) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return f"{what}: HF_HUB_OFFLINE is set; unset it, or prepare local files: {READABLE}"
    if isinstance(error, GatedRepoError):
        return f"{what}: asks for your consent on its page first; then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{what}: there is none of this name on the Hub, nor a folder here (a private one "
            "needs HF_TOKEN set)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: has no such --revision"
    if isinstance(error, HFValidationError):
        return f"{what}: is no name of a data set; write owner/name"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{what}: has no files there; check --name (sample-10BT, sample-100BT, ...)"
    if status == 429:
        return (
            f"{what}: the Hub limits the rate of requests (429) and has not relented; set "
            "HF_TOKEN, which raises the limit, or run the same command later: it goes on from here"
        )
    if status is not None:
        return (
            f"{what}: the Hub answered {status}; run the same command later: it goes on from here"
        )
    if _is_network_error(error):
        return (
            f"{what}: the Hub could not be reached ({type(error).__name__}); check the network and "
            f"run the same command again, or prepare local files: {READABLE}"
        )
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
