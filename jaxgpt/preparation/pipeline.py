"""Text to shards, resuming where an earlier run stopped.

The parent hands units of work to an engine, and cuts shards from what comes back.
"""

import math
import os
import shutil
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from pathlib import Path

from jaxgpt.data.manifest import MANIFEST, Manifest, load_manifest, size_errors
from jaxgpt.data.token_file import refuse
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import sha256_of
from jaxgpt.preparation.assemble import Assembler
from jaxgpt.preparation.cluster import connect
from jaxgpt.preparation.estimate import downloads_ahead, estimate_rows, estimate_work
from jaxgpt.preparation.flags import PrepareFlags
from jaxgpt.preparation.hub import DOWNLOADS, Downloads
from jaxgpt.preparation.inputs import Input, Unit
from jaxgpt.preparation.make_plan import make_plan, refuse_bad_splits, tokenizer_of_flags
from jaxgpt.preparation.output_folder import OutputFolder, check_free_space
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.text_manifest import text_manifest
from jaxgpt.preparation.tokenize import Job, tokens_being_written
from jaxgpt.preparation.work_files import HubSource, Plan, Record
from jaxgpt.preparation.workers import AHEAD, DeadWorkerError, Engine, Pool, run_job
from jaxgpt.run.console import counted, print_table

POLL_SECONDS, SHOW_SECONDS = 0.2, 1


def prepare_text(flags: PrepareFlags, folder: OutputFolder) -> Manifest:
    """Make the missing shards of a folder and return its manifest. Raises UserError."""
    out = folder.out
    tokenizer = tokenizer_of_flags(flags, folder)
    plan = make_plan(flags, folder, tokenizer)
    tokenizer.save(out)  # the workers read it, and so does training
    limit = flags.most_tokens
    assembler = Assembler(out, folder.work, plan, limit, tokenizer.eot, tokenizer.dtype)
    refuse(list(size_errors(out, assembler.shards, tokenizer.dtype)))
    manifest = load_manifest(out)
    if assembler.finished and manifest is not None:
        print(f"{out}: is complete; there is nothing to do")
    else:
        (out / MANIFEST).unlink(missing_ok=True)  # a folder with a manifest is complete
        _tokenize(flags, folder, plan, tokenizer, assembler, limit)
        records = assembler.used_records()
        refuse_bad_splits(out, plan.settings, assembler.shards, records)
        manifest = text_manifest(plan, tokenizer, assembler.shards, records)
        manifest.save(out / MANIFEST)
    assembler.delete_parts()  # a limit leaves parts and downloads
    shutil.rmtree(folder.work / DOWNLOADS, ignore_errors=True)
    return manifest


def _tokenize(
    flags: PrepareFlags,
    folder: OutputFolder,
    plan: Plan,
    tokenizer: Tokenizer,
    assembler: Assembler,
    limit: int | None,
) -> None:
    opened: AbstractContextManager[Engine] = (
        connect(flags.cluster) if flags.cluster else Pool(flags.workers or available_cpus())
    )
    with opened as engine:
        workers = engine.workers()
        estimate = estimate_work(plan, tokenizer, limit, workers)
        remaining = max(0, estimate.shard_bytes - tokenizer.dtype.itemsize * assembler.tokens_done)
        free = check_free_space(folder.out, remaining + estimate.temporary_bytes)
        title = f"jaxgpt prepare {' '.join(flags.inputs[:3])} -> {folder.out}"
        rows = estimate_rows(estimate, plan, limit is not None, workers, free)
        if done := assembler.shards:
            rows["already done"] = (
                f"{assembler.tokens_done:,} tokens, {counted(len(done), 'shard')}"
            )
        print_table(title, rows)
        pending = set(assembler.pending_units())
        by_number = enumerate(plan.units())
        done_bytes = sum(s.size for n, unit in by_number if n not in pending for s in unit)
        with PreparationConsole(estimate.needed_bytes, done_bytes) as console:
            loop = UnitLoop(engine, assembler, plan, folder.work, console, estimate.bytes_per_token)
            loop.run()


def available_cpus() -> int:
    """The CPUs that this process may run on; in a container or a Slurm job not all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    ):
        """`bytes_per_token`: of the input, for the progress within units."""
        self._engine, self._assembler, self._console = engine, assembler, console
        self._plan, self._work, self._units = plan, work, plan.units()
        self._plan_sha256 = sha256_of(work / "plan.json")
        self._running: dict[Future[Record], int] = {}
        self._deaths = Counter[int]()  # of workers, by unit
        self._made = Counter[str]()  # tokens, documents and bytes of the units that are done
        self._bytes_per_token, self._shown = bytes_per_token, -math.inf
        needed = [self._inputs_of(number) for number in assembler.pending_units()]
        self._uses = Counter(path for inputs in needed for path in inputs)
        self._downloads: Downloads | None = None
        if isinstance(plan.source, HubSource):
            items = {path: item for inputs in needed for path, item in inputs.items()}
            self._downloads = Downloads(
                list(items.values()),
                plan.source,
                work / DOWNLOADS,
                lambda: downloads_ahead(engine.workers()),
                console.say,
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
        """Submit pending units in order while there is room; returns what it waits for."""
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
        for path, item in inputs.items():
            if self._downloads and not self._uses[path]:
                self._downloads.delete(item)

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
        if self._downloads:
            paths = [self._downloads.local(slice.input) for slice in unit]  # of all: it starts them
            if None in paths:
                return None
            located = zip(unit, paths, strict=True)
            unit = tuple(slice._replace(path=str(path)) for slice, path in located)
        return Job(number, unit, self._plan.settings, self._work / "parts", self._plan_sha256)

    def _inputs_of(self, number: int) -> dict[str, Input]:
        unit: Unit = self._units[number]
        return {slice.input.path: slice.input for slice in unit}
