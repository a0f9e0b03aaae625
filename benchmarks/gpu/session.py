"""One call of quarter_hour.py: its time, its folders, and running its parts one by one."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from predictions import PREDICTIONS, table

FINE = ("exit code 0", "skipped")  # beginnings of the outcomes of parts that did not fail
RESERVE = 8.0  # seconds for the table and the bundle


@dataclasses.dataclass
class Session:
    """One call: its time, its folders, and what its parts printed."""

    name: str
    seconds: float
    out: Path
    work: Path
    environment: Mapping[str, str]
    skip: Sequence[str] = ()  # names of parts
    began: float = dataclasses.field(default_factory=time.monotonic)
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def trial(self) -> bool:
        return self.name == "trial"

    @property
    def patience(self) -> float:
        """The factor of all time limits: a trial may share its machine."""
        return 4.0 if self.trial else 1.0

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began) - RESERVE

    def run(
        self, name: str, least: float, limit: float, command: Sequence[object], **environment: str
    ) -> int | None:
        """Run a part for at most `limit` seconds, if at least `least` are left.

        The JSON that it prints is added to the results, even if it is killed. Returns its exit
        code, None if it was not started.
        """
        if name in self.skip:
            self.record(name, "skipped: as asked", 0)
            return None
        if self.left() < least:
            self.record(name, f"not begun, {self.left():.0f} s left", 0)
            return None
        words = [str(word) for word in command]
        began = time.monotonic()
        path = self.work / f"{name}.out"
        with path.open("wb") as out, self.log.open("ab") as log:
            log.write(f"=== {name}: {' '.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                words, stdout=out, stderr=log, start_new_session=True,
                env={**self.environment, **environment},
            )  # fmt: skip
            try:
                code = process.wait(min(self.patience * limit, self.left()))
                outcome = f"exit code {code}"
            except subprocess.TimeoutExpired:
                code, outcome = -signal.SIGKILL, "killed at its limit"
            finally:
                end_group(process)
        self.results.setdefault(name, []).extend(json_objects(path.read_text(errors="replace")))
        self.record(name, outcome, time.monotonic() - began)
        return code

    @property
    def log(self) -> Path:
        return self.out / f"{self.name}.log"

    def record(self, name: str, outcome: str, seconds: float) -> None:
        self.parts.append({"part": name, "outcome": outcome, "seconds": round(seconds, 1)})
        print(f"{name}: {outcome}, {seconds:.0f} s, {self.left():.0f} s left", flush=True)
        if outcome.startswith(("exit code", "killed")) and not outcome.startswith(FINE):
            tail = self.log.read_text(errors="replace").splitlines()[-4:]
            print("\n".join(f"    {line[:300]}" for line in tail), flush=True)
        self.save()

    def lines(self) -> list[dict[str, Any]]:
        """The table so far."""
        return table(PREDICTIONS[self.name], self.results, self.about.get("device", ""))

    def save(self) -> None:
        """Write everything so far."""
        everything = {"lines": self.lines(), "parts": self.parts, "results": self.results}
        path = self.out / f"{self.name}.json"
        path.with_suffix(".part").write_text(
            json.dumps({**self.about, **everything}, indent=1) + "\n"
        )
        path.with_suffix(".part").replace(path)


def end_group(process: subprocess.Popen) -> None:
    """Kill a part and its child processes, which would keep the card's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def json_objects(text: str) -> list[dict]:
    """The complete JSON objects that start at the beginning of a line of `text`."""
    found, decoder, position = [], json.JSONDecoder(), 0
    while (position := text.find("{", position)) >= 0:
        if position and text[position - 1] != "\n":
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
            found.append(value)
        except json.JSONDecodeError:
            position += 1
    return found
