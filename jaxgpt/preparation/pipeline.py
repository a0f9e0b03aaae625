"""Text into shards, from wherever an earlier run got to."""

import os
import shutil
from collections.abc import Callable, Set
from pathlib import Path

from rich.filesize import decimal

from jaxgpt.data.manifest import MANIFEST, size_errors
from jaxgpt.data.token_file import refuse
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.assemble import Assembler, empty_splits
from jaxgpt.preparation.estimate import check_disk, estimate
from jaxgpt.preparation.flags import Flags, count
from jaxgpt.preparation.hub import DOWNLOADS, Downloads, download, remove_torn_downloads
from jaxgpt.preparation.inputs import Input
from jaxgpt.preparation.make_plan import explain_empty, make_plan
from jaxgpt.preparation.manifest import (
    TextManifest,
    load_text_manifest,
    manifest_name,
    text_manifest,
)
from jaxgpt.preparation.output_folder import Folder
from jaxgpt.preparation.plan import HubSource, Plan
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.workers import Locate, run_units
from jaxgpt.run.console import duration, print_table


def prepare_text(flags: Flags, folder: Folder) -> TextManifest:
    """Make what is still missing in a folder; returns its manifest. Raises UserError."""
    out, world_size = folder.out, folder.world_size
    tokenizer = load_tokenizer(flags.tokenizer)
    plan = make_plan(flags, folder, tokenizer)
    limit = count(flags, "limit_tokens")
    if limit is not None:
        limit //= world_size
    assembler = Assembler(out, folder.work, plan, limit, tokenizer.eot)
    refuse(list(size_errors(out, assembler.shards)))
    path = out / manifest_name(folder.rank, world_size)
    manifest = load_text_manifest(path)
    if assembler.finished and manifest is not None:
        _clean(folder, assembler)
        print(f"{out}: is complete; there is nothing to do")
        return manifest
    for stale in {path, out / MANIFEST}:  # a folder that has one is complete
        stale.unlink(missing_ok=True)
    _tokenize(flags, folder, plan, assembler, limit)
    records = assembler.used_records()
    if world_size == 1 and (missing := empty_splits(assembler)):
        raise UserError(explain_empty(out, plan.settings, missing[0], records))
    manifest = text_manifest(plan, tokenizer, assembler.shards, records)
    manifest.save(path)
    _clean(folder, assembler)
    return manifest


def _clean(folder: Folder, assembler: Assembler) -> None:
    """Delete what only the work needed; a limit leaves tokens and downloads behind."""
    assembler.clean()
    shutil.rmtree(folder.work / DOWNLOADS, ignore_errors=True)


def _tokenize(
    flags: Flags, folder: Folder, plan: Plan, assembler: Assembler, limit: int | None
) -> None:
    """Say what it will take, and do it."""
    workers = flags.workers or available_cpus()
    input_bytes = _say_what_it_takes(flags, folder, plan, assembler, limit, workers)
    pending = set(assembler.pending_units())
    units = enumerate(plan.units())
    done = sum(s.size for number, unit in units if number not in pending for s in unit)
    with PreparationConsole(input_bytes, done) as console:
        locate, release = _places(plan, pending, folder.work, console.say)
        run_units(assembler, plan, folder.work, workers, console, locate, release)


def _say_what_it_takes(
    flags: Flags,
    folder: Folder,
    plan: Plan,
    assembler: Assembler,
    limit: int | None,
    workers: int,
) -> int:
    """Print the estimate and check the disk; returns the bytes to be read. Raises UserError."""
    inputs = [item for round in plan.rounds for item in round]
    size = estimate(plan, inputs, limit, workers)
    still = max(0, size.disk_bytes - 2 * assembler.tokens_done)
    free = check_disk(folder.out, still + size.working_bytes)
    on_hub = plan.source if isinstance(plan.source, HubSource) else None
    rows = {
        "input": f"{len(inputs):,} files, {decimal(size.input_bytes)}"
        + (f" of {on_hub.repo} {on_hub.name}, downloaded as they are needed" if on_hub else "")
        + (f"; the limit is reached after about {decimal(size.needed_bytes)}" if limit else ""),
        "tokens": f"about {size.tokens:,} of tokenizer {plan.settings.tokenizer!r}, in shards "
        f"of {plan.settings.shard_tokens:,}",
        "disk": f"about {decimal(size.disk_bytes)}, and {decimal(size.working_bytes)} beside it "
        f"while this runs; {free} are free",
        "time": f"about {duration(size.core_seconds / workers)} with {workers} workers"
        + (", unless the download takes longer" if on_hub else ""),
    }
    if assembler.shards:
        rows["done before"] = f"{assembler.tokens_done:,} tokens, {len(assembler.shards)} shards"
    print_table(f"jaxgpt prepare {' '.join(flags.inputs[:3])} -> {folder.out}", rows)
    return size.needed_bytes


def _places(
    plan: Plan, pending: Set[int], work: Path, say: Callable[[str], None]
) -> tuple[Locate, Callable[[Input], object]]:
    """Where each input can be read, and what to do once it is not needed."""
    if not isinstance(plan.source, HubSource):
        return (lambda item: Path(item.path)), (lambda item: None)
    repo, commit, folder = plan.source.repo, plan.source.commit, work / DOWNLOADS

    def get(item: Input) -> Path:
        sha256 = item.check if len(item.check) == 64 else None  # or git's, of a small file
        return download(repo, item.path, item.size, sha256, commit, folder, say)

    remove_torn_downloads(folder)

    units = [unit for number, unit in enumerate(plan.units()) if number in pending]
    needed = {slice.input.path: slice.input for unit in units for slice in unit}
    downloads = Downloads(list(needed.values()), get)
    return downloads.local, lambda item: (folder / item.path).unlink(missing_ok=True)


def available_cpus() -> int:
    """CPUs that this process may run on: fewer than there are, in a container or a Slurm job."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
