"""Text to shards, resuming where an earlier run stopped."""

import os
import shutil
from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from pathlib import Path

from jaxgpt.data.manifest import MANIFEST, Manifest, load_manifest, size_errors
from jaxgpt.data.token_file import refuse
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.preparation.assemble import Assembler
from jaxgpt.preparation.characters import tokenizer_of_flags
from jaxgpt.preparation.cluster import connect
from jaxgpt.preparation.estimate import downloads_ahead, estimate_rows, estimate_work
from jaxgpt.preparation.flags import PrepareFlags
from jaxgpt.preparation.hub import DOWNLOADS, Downloads, download, remove_leftover_downloads
from jaxgpt.preparation.inputs import Input
from jaxgpt.preparation.make_plan import make_plan, refuse_bad_splits
from jaxgpt.preparation.output_folder import OutputFolder, check_free_space
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.run_units import Locate, UnitLoop
from jaxgpt.preparation.text_manifest import text_manifest
from jaxgpt.preparation.work_plan import HubSource, Plan
from jaxgpt.preparation.workers import Engine, Pool
from jaxgpt.run.console import counted, print_table


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
        _delete_temporary_files(folder, assembler)
        print(f"{out}: is complete; there is nothing to do")
        return manifest
    (out / MANIFEST).unlink(missing_ok=True)  # a folder with a manifest is complete
    _tokenize(flags, folder, plan, tokenizer, assembler, limit)
    records = assembler.used_records()
    refuse_bad_splits(out, plan.settings, assembler.shards, records)
    manifest = text_manifest(plan, tokenizer, assembler.shards, records)
    manifest.save(out / MANIFEST)
    _delete_temporary_files(folder, assembler)
    return manifest


def _delete_temporary_files(folder: OutputFolder, assembler: Assembler) -> None:
    assembler.delete_parts()  # a limit leaves parts and downloads
    shutil.rmtree(folder.work / DOWNLOADS, ignore_errors=True)


def _tokenize(
    flags: PrepareFlags,
    folder: OutputFolder,
    plan: Plan,
    tokenizer: Tokenizer,
    assembler: Assembler,
    limit: int | None,
) -> None:
    with _open_engine(flags) as engine:
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
        units = enumerate(plan.units())
        done_bytes = sum(s.size for number, unit in units if number not in pending for s in unit)
        with PreparationConsole(estimate.needed_bytes, done_bytes) as console:
            locate, release = _make_locate(plan, pending, folder.work, engine, console.say)
            per_token = estimate.bytes_per_token
            loop = UnitLoop(
                engine, assembler, plan, folder.work, console, per_token, locate, release
            )
            loop.run()


def _open_engine(flags: PrepareFlags) -> AbstractContextManager[Engine]:
    return connect(flags.cluster) if flags.cluster else Pool(flags.workers or available_cpus())


def _make_locate(
    plan: Plan, pending: Set[int], work: Path, engine: Engine, say: Callable[[str], None]
) -> tuple[Locate, Callable[[Input], object]]:
    """A function that returns an input's path, and one for an input that is no longer needed."""
    if not isinstance(plan.source, HubSource):
        return (lambda item: Path(item.path)), (lambda item: None)
    repo, commit, folder = plan.source.repo, plan.source.commit, work / DOWNLOADS

    def get(item: Input) -> Path:
        sha256 = item.check if len(item.check) == 64 else None  # git's for small files is shorter
        return download(repo, item.path, item.size, sha256, commit, folder, say)

    remove_leftover_downloads(folder)
    units = [unit for number, unit in enumerate(plan.units()) if number in pending]
    needed = {slice.input.path: slice.input for unit in units for slice in unit}
    downloads = Downloads(list(needed.values()), get, lambda: downloads_ahead(engine.workers()))
    return downloads.local, lambda item: (folder / item.path).unlink(missing_ok=True)


def available_cpus() -> int:
    """The CPUs that this process may run on; in a container or a Slurm job not all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
