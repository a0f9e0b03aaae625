"""Text to shards, resuming where an earlier run stopped."""

import os
import shutil
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from jaxgpt.data.manifest import MANIFEST, Manifest, load_manifest, size_errors
from jaxgpt.data.token_file import refuse
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.assemble import Assembler
from jaxgpt.preparation.flags import PrepareFlags
from jaxgpt.preparation.hub import DOWNLOADS, Downloads, download, remove_leftover_downloads
from jaxgpt.preparation.inputs import TEXT_BYTES_PER_TOKEN, Input
from jaxgpt.preparation.make_plan import empty_split_error, make_plan
from jaxgpt.preparation.output_folder import OutputFolder, check_free_space
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.text_manifest import text_manifest
from jaxgpt.preparation.work_plan import HubSource, Plan
from jaxgpt.preparation.workers import AHEAD, Locate, run_units
from jaxgpt.run.console import duration, print_table

# GPT-2's BPE on one core of a server; benchmarks/results/prepare-throughput.json has a smaller
# machine's.
TEXT_BYTES_PER_CORE_SECOND = 18e6
DOWNLOADS_AT_ONCE = 4  # files of the Hub that may be on disk at the same time


@dataclass(frozen=True)
class Estimate:
    """What a complete preparation needs, roughly."""

    input_bytes: int
    needed_bytes: int  # of the input, until the limit is reached
    tokens: int
    shard_bytes: int
    temporary_bytes: int  # in addition, while it runs
    core_seconds: float


def estimate_work(
    plan: Plan, inputs: Sequence[Input], limit_tokens: int | None, workers: int
) -> Estimate:
    """What preparing `inputs` needs, all of them or up to the limit."""
    s = plan.settings
    per_token = 1.0 if s.tokenizer == "byte" else TEXT_BYTES_PER_TOKEN
    n_bytes = needed = sum(item.size for item in inputs)
    text = sum(item.text_bytes for item in inputs)
    tokens = int(text / per_token)
    if limit_tokens is not None:
        fraction = min(1.0, (limit_tokens + (s.val_tokens or 0)) / max(tokens, 1))
        tokens, text = int(tokens * fraction), int(text * fraction)
        needed = int(n_bytes * fraction)
    unit_tokens = min(s.unit_bytes / per_token, tokens)
    waiting = min(tokens, s.shard_tokens + workers * AHEAD * unit_tokens)
    on_hub = isinstance(plan.source, HubSource)
    largest = max((item.size for item in inputs), default=0) if on_hub else 0
    return Estimate(
        input_bytes=n_bytes,
        needed_bytes=needed,
        tokens=tokens,
        shard_bytes=2 * tokens,
        temporary_bytes=int(2 * waiting) + min(DOWNLOADS_AT_ONCE, len(inputs)) * largest,
        core_seconds=text / TEXT_BYTES_PER_CORE_SECOND,
    )


def prepare_text(flags: PrepareFlags, folder: OutputFolder) -> Manifest:
    """Make the missing shards of a folder and return its manifest. Raises UserError."""
    out = folder.out
    tokenizer = load_tokenizer(flags.tokenizer)
    plan = make_plan(flags, folder, tokenizer)
    limit = flags.number_of("limit_tokens")
    assembler = Assembler(out, folder.work, plan, limit, tokenizer.eot)
    refuse(list(size_errors(out, assembler.shards)))
    manifest = load_manifest(out)
    if assembler.finished and manifest is not None:
        _delete_temporary_files(folder, assembler)
        print(f"{out}: is complete; there is nothing to do")
        return manifest
    (out / MANIFEST).unlink(missing_ok=True)  # a folder with a manifest is complete
    _tokenize(flags, folder, plan, assembler, limit)
    records = assembler.used_records()
    if missing := assembler.empty_splits:
        raise UserError(empty_split_error(out, plan.settings, missing[0], records))
    manifest = text_manifest(plan, tokenizer, assembler.shards, records)
    manifest.save(out / MANIFEST)
    _delete_temporary_files(folder, assembler)
    return manifest


def _delete_temporary_files(folder: OutputFolder, assembler: Assembler) -> None:
    assembler.delete_parts()  # a limit leaves parts and downloads
    shutil.rmtree(folder.work / DOWNLOADS, ignore_errors=True)


def _tokenize(
    flags: PrepareFlags, folder: OutputFolder, plan: Plan, assembler: Assembler, limit: int | None
) -> None:
    workers = flags.workers or available_cpus()
    inputs = [item for round in plan.rounds for item in round]
    estimate = estimate_work(plan, inputs, limit, workers)
    remaining = max(0, estimate.shard_bytes - 2 * assembler.tokens_done)
    free = check_free_space(folder.out, remaining + estimate.temporary_bytes)
    title = f"jaxgpt prepare {' '.join(flags.inputs[:3])} -> {folder.out}"
    rows = _estimate_rows(estimate, plan, len(inputs), limit is not None, workers, free)
    if assembler.shards:
        rows["already done"] = f"{assembler.tokens_done:,} tokens, {len(assembler.shards)} shards"
    print_table(title, rows)
    pending = set(assembler.pending_units())
    units = enumerate(plan.units())
    done = sum(s.size for number, unit in units if number not in pending for s in unit)
    with PreparationConsole(estimate.needed_bytes, done) as console:
        locate, release = _make_locate(plan, pending, folder.work, console.say)
        run_units(assembler, plan, folder.work, workers, console, locate, release)


def _estimate_rows(
    estimate: Estimate, plan: Plan, n_inputs: int, limited: bool, workers: int, free: str
) -> dict[str, str]:
    """The estimate as rows of a table; `free` is the free space of the disk."""
    on_hub, s = plan.source if isinstance(plan.source, HubSource) else None, plan.settings
    return {
        "input": f"{n_inputs:,} files, {decimal(estimate.input_bytes)}"
        + (f" of {on_hub.repo} {on_hub.name}, downloaded when needed" if on_hub else "")
        + (f"; limit reached after about {decimal(estimate.needed_bytes)}" if limited else ""),
        "tokens": f"about {estimate.tokens:,} of tokenizer {s.tokenizer!r}, in shards of "
        f"{s.shard_tokens:,}",
        "disk": f"about {decimal(estimate.shard_bytes)}, plus {decimal(estimate.temporary_bytes)} "
        f"while this runs; {free} free",
        "time": f"about {duration(estimate.core_seconds / workers)} with {workers} workers"
        + (", unless the download takes longer" if on_hub else ""),
    }


def _make_locate(
    plan: Plan, pending: Set[int], work: Path, say: Callable[[str], None]
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
    downloads = Downloads(list(needed.values()), get)
    return downloads.local, lambda item: (folder / item.path).unlink(missing_ok=True)


def available_cpus() -> int:
    """The CPUs that this process may run on; in a container or a Slurm job not all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
