"""The parent's loop: hands units to an engine and cuts shards from what comes back."""

import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.files import sha256_of
from jaxgpt.preparation.assemble import Assembler
from jaxgpt.preparation.inputs import Input, Unit
from jaxgpt.preparation.journal import Record
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.tokenize import Job, tokens_being_written
from jaxgpt.preparation.work_plan import Plan
from jaxgpt.preparation.workers import DeadWorkerError, Engine, run_job

# Units per worker that may be started ahead of the first unfinished one; their tokens are on disk.
AHEAD = 3
POLL_SECONDS, SHOW_SECONDS = 0.2, 1

Locate = Callable[[Input], Path | None]  # where an input can be read, None while it is downloading


class UnitLoop:
    """Runs the pending units of a folder."""

    def __init__(
        self,
        engine: Engine,
        assembler: Assembler,
        plan: Plan,
        work: Path,
        console: PreparationConsole,
        bytes_per_token: float,
        locate: Locate,
        release: Callable[[Input], object],
    ):
        """`release` is called with each input that is no longer needed.

        `bytes_per_token`: of the input, for the progress within units.
        """
        self._engine, self._assembler, self._console = engine, assembler, console
        self._plan, self._work, self._units = plan, work, plan.units()
        self._locate, self._release = locate, release
        self._plan_sha256 = sha256_of(work / "plan.json")
        self._running: dict[Future[Record], int] = {}
        self._deaths = Counter[int]()  # of workers, by unit
        self._made = Counter[str]()  # tokens, documents and bytes of the units that are done
        self._bytes_per_token, self._shown = bytes_per_token, -math.inf
        self._uses = Counter(
            path for number in assembler.pending_units() for path in self._inputs_of(number)
        )

    def run(self) -> None:
        """Process the pending units and cut shards until all are written. Raises UserError."""
        self._assembler.write_complete_shards()
        while not self._assembler.finished:
            note = self._start_units()
            if not self._running:
                time.sleep(POLL_SECONDS)  # until a download or a worker is there
            done = wait(self._running, POLL_SECONDS, FIRST_COMPLETED).done
            for future in done:
                self._finish(future, self._running.pop(future))
            if done:
                self._start_units()  # before the workers wait for shards
                self._assembler.write_complete_shards()
            self._show(note)

    def _start_units(self) -> str:
        """Submit pending units in order, as many as there is room for; returns why not more."""
        started = set(self._running.values())
        pending = [number for number in self._assembler.pending_units() if number not in started]
        workers = self._engine.workers()
        room = workers + math.ceil(workers * self._engine.waiting)
        for number in pending:
            first = min([*self._running.values(), number])
            if len(self._running) >= room or number - first > AHEAD * workers:
                break
            job = self._locate_job(number)
            if job is None:
                return "waiting for a download"
            self._running[self._engine.submit(run_job, job)] = number
        return "" if workers else "waiting for workers"

    def _finish(self, future: Future[Record], number: int) -> None:
        try:
            record = self._engine.result(future)
        except DeadWorkerError:
            self._count_death(number)
            return
        self._assembler.add(record)
        tokens = sum(record.tokens.values())
        self._made.update(tokens=tokens, documents=record.documents, bytes=record.bytes)
        inputs = self._inputs_of(number)
        self._uses.subtract(inputs.keys())
        for path in inputs:
            if not self._uses[path]:
                self._release(inputs[path])

    def _count_death(self, number: int) -> None:
        """Let a unit be started again, or raise UserError if it has had all its tries."""
        self._deaths[number] += 1
        self._assembler.remove_unfinished_parts(number)
        first = next(iter(self._inputs_of(number)))
        if self._deaths[number] >= self._engine.tries:
            raise UserError(
                f"{first}: workers were killed whenever they tokenized unit {number}, which begins "
                "in this file, most likely because memory ran out; resume with the same command, "
                "and fewer --workers or workers with more memory"
            )
        self._console.say(f"a worker was killed in unit {number} ({first}); starting it again")

    def _show(self, note: str) -> None:
        """The progress by what is on disk: nothing is shared with the workers but folders."""
        if time.monotonic() - self._shown < SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        made, dtype = self._made, self._assembler.dtype
        tokens = tokens_being_written(self._work / "parts", dtype)
        started = sum(slice.size for n in self._running.values() for slice in self._units[n])
        n_bytes = int(min(tokens * self._bytes_per_token, started))
        done = self._console.done_before + made["bytes"] + n_bytes
        self._console.update(done, made["tokens"] + tokens, made["documents"], note)

    def _locate_job(self, number: int) -> Job | None:
        """A unit with the paths of its inputs, None while one is downloading."""
        unit = self._units[number]
        paths = [self._locate(slice.input) for slice in unit]  # of all, to start their downloads
        if None in paths:
            return None
        located = (slice._replace(path=str(path)) for slice, path in zip(unit, paths, strict=True))
        parts = self._work / "parts"
        return Job(number, tuple(located), self._plan.settings, parts, self._plan_sha256)

    def _inputs_of(self, number: int) -> dict[str, Input]:
        unit: Unit = self._units[number]
        return {slice.input.path: slice.input for slice in unit}
