"""Requests to the Hub: temporary errors are retried, others become an error message.

The Hub limits the rate of requests, so waiting often helps.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from jaxgpt.errors import UserError, first_line
from jaxgpt.preparation.inputs import READABLE

T = TypeVar("T")

WAITS = (1, 2, 4, 8, 15, 30, 60)  # seconds between tries
QUICK_WAITS = (0.5, 1)  # if the first request of all finds no network


def retry_request(
    request: Callable[[], T], what: str, say: Callable[[str], object], *, first: bool
) -> T:
    """The result of a request to the Hub, retried after errors of the network or the server.

    `what` names the thing in messages. `first`: no request has succeeded yet, so a missing network
    is reported soon. Raises UserError for a permanent error and when all retries have failed.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()  # we show our own
    logging.set_verbosity_error()  # the client retries by itself too, with a warning each time
    tries = 0
    while True:
        try:
            return request()
        except UserError:
            raise
        except Exception as error:
            status = _status(error)
            waits = QUICK_WAITS if first and status is None else WAITS
            if not _is_temporary(error) or tries >= len(waits):
                raise UserError(_error_message(error, what, status)) from None
            wait = max(waits[tries], _retry_after(error))
            say(f"{what}: {_reason(error, status)}; retrying in {wait:g} s")
            time.sleep(wait)
            tries += 1


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, None if there was no response."""
    return getattr(_response(error), "status_code", None)


def _response(error: BaseException | None) -> Any:
    """The HTTP response that an error has, itself or its cause: the client wraps some errors."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return getattr(error, "response", None)


def _is_temporary(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return _is_network_error(error)


def _is_network_error(error: BaseException | None) -> bool:
    """By type or by class name: huggingface_hub has changed its HTTP library twice."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if error is None or isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"TransportError", "RequestException", "RemoteProtocolError"})


def _retry_after(error: BaseException) -> float:
    """The seconds in the Retry-After header, at most five minutes."""
    headers = getattr(_response(error), "headers", None) or {}
    seconds = str(headers.get("retry-after", ""))
    return min(300.0, float(seconds)) if seconds.replace(".", "", 1).isdigit() else 0.0


def _reason(error: BaseException, status: int | None) -> str:
    if status == 429:
        return "the Hub limits the rate of requests (429)"
    if status is not None:
        return f"the Hub returned status {status}"
    if type(error) is ConnectionError:  # ours, or hf_xet's
        return first_line(error)
    return f"the Hub could not be reached ({type(error).__name__})"


def _error_message(error: BaseException, what: str, status: int | None) -> str:
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
        return f"{what}: requires your consent on its page first; then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{what}: does not exist on the Hub, nor as a folder here (for a private one set "
            "HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: has no such --revision"
    if isinstance(error, HFValidationError):
        return f"{what}: is not a valid name of a data set; write owner/name"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{what}: has no files there; check --name (sample-10BT, sample-100BT, ...)"
    if status == 429:
        return (
            f"{what}: the Hub still limits the rate of requests (429); set HF_TOKEN, which raises "
            "the limit, or run the same command again later to resume"
        )
    if status is not None:
        return (
            f"{what}: the Hub returned status {status}; run the same command again later to resume"
        )
    if _is_network_error(error):
        return (
            f"{what}: {_reason(error, status)}; check the network and run the same command again, "
            f"or prepare local files: {READABLE}"
        )
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
