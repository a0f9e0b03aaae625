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
            response = _response(error)
            status = getattr(response, "status_code", None)  # None without a response
            is_temporary = _is_network_error(error)
            if status is not None:
                is_temporary = status in (408, 429) or status >= 500
            waits = QUICK_WAITS if first and status is None else WAITS
            if not is_temporary or tries >= len(waits):
                raise UserError(f"{what}: {_explain(error, status)}") from None
            wait = max(waits[tries], _retry_after(response))
            say(f"{what}: {_reason(error, status)}; retrying in {wait:g} s")
            time.sleep(wait)
            tries += 1


def _response(error: BaseException | None) -> Any:
    """The HTTP response that an error has, itself or its cause: the client wraps some errors."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return getattr(error, "response", None)


def _is_network_error(error: BaseException) -> bool:
    """By type or by class name: huggingface_hub has changed its HTTP library twice."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"TransportError", "RequestException", "RemoteProtocolError"})


def _retry_after(response: Any) -> float:
    """The seconds in the Retry-After header, at most five minutes."""
    headers = getattr(response, "headers", None) or {}
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


def _explain(error: BaseException, status: int | None) -> str:
    """Reason and remedy of an error that is final."""
    from huggingface_hub import errors

    if status is None and _is_network_error(error):
        return (
            f"{_reason(error, status)}; check the network and run the same command again, or "
            f"prepare local files: {READABLE}"
        )
    explained = {  # subclasses first
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it, or prepare local files: "
        + READABLE,
        errors.GatedRepoError: "requires your consent on its page first; then set HF_TOKEN",
        errors.RepositoryNotFoundError: "does not exist on the Hub, nor as a folder here (for a "
        "private one set HF_TOKEN)",
        errors.RevisionNotFoundError: "has no such --revision",
        errors.HFValidationError: "is not a valid name of a dataset; write owner/name",
        errors.EntryNotFoundError: "has no files there; check --name (sample-10BT, sample-100BT, "
        "...)",
    }
    for kind, explanation in explained.items():
        # LocalEntryNotFoundError only wraps the one that explains it.
        if isinstance(error, kind) and not isinstance(error, errors.LocalEntryNotFoundError):
            return explanation
    if status in (401, 403):
        return f"{_reason(error, status)}; set HF_TOKEN to a token that may read it"
    if status is not None:
        token = "set HF_TOKEN, which raises the limit, or " if status == 429 else ""
        return f"{_reason(error, status)}; {token}run the same command again later to resume"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
