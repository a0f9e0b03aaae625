"""Which errors of the Hub are retried, and for how long."""

from typing import Any

import pytest

from jaxgpt.errors import UserError
from jaxgpt.preparation import hub_retry
from jaxgpt.preparation.hub_retry import retry_request


class RefusedError(Exception):
    def __init__(self, status: int, headers: dict[str, str] | None = None):
        super().__init__(f"status {status}")
        self.response: Any = type("Response", (), {"status_code": status, "headers": headers or {}})


def retry_until(monkeypatch: pytest.MonkeyPatch, errors: list[Exception], **flags: bool) -> Any:
    """(answer or message, the seconds waited) of a question that fails with each of `errors`."""
    waits: list[float] = []
    monkeypatch.setattr(hub_retry.time, "sleep", waits.append)
    left = list(errors)

    def question() -> str:
        if left:
            raise left.pop(0)
        return "answer"

    try:
        return retry_request(question, "it", lambda _: None, **{"first": False, **flags}), waits
    except UserError as error:
        return str(error), waits


def test_the_wait_grows_with_each_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, waits = retry_until(
        monkeypatch, [RefusedError(429), ConnectionError(), RefusedError(503)]
    )
    assert (answer, waits) == ("answer", [1, 2, 4])


def test_the_retry_after_header_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, waits = retry_until(monkeypatch, [RefusedError(429, {"retry-after": "37"})])
    assert (answer, waits) == ("answer", [37])


def test_the_last_retry_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    message, waits = retry_until(monkeypatch, [RefusedError(429)] * 99)
    assert waits == list(hub_retry.WAITS)
    assert "set HF_TOKEN" in message
    assert "run the same command again later to resume" in message
    message, waits = retry_until(monkeypatch, [RefusedError(403)])
    assert waits == []
    assert message == "it: the Hub returned status 403; set HF_TOKEN to a token that may read it"
    message, waits = retry_until(monkeypatch, [ConnectionError()] * 99, first=True)
    assert sum(waits) < 3
