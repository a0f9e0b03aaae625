"""Questions to the Hub: what may pass is asked again after a while, the rest is told in a sentence.

The Hub limits how often it may be asked; a refusal is waited out before anyone is told of it.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from jaxgpt.errors import UserError, first_line
from jaxgpt.preparation.inputs import READABLE

T = TypeVar("T")

WAITS = (1, 2, 4, 8, 15, 30, 60)  # seconds between tries
QUICK_WAITS = (0.5, 1)  # when the first question of all finds no network


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
    if type(error) is ConnectionError:  # in our own words, or hf_xet's
        return first_line(error)
    return f"the Hub could not be reached ({type(error).__name__})"


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
            f"{what}: {_reason(error, status)}; check the network and run the same command again, "
            f"or prepare local files: {READABLE}"
        )
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
